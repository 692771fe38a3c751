// The Python face of the lanes.
#include "bind_lanes.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "nudging/lanes.h"

namespace py = pybind11;

namespace nudging {

namespace {

using Address = std::uintptr_t;
using RowTuple = std::tuple<Position, Token, Token, double>;
using NeedTuple = std::tuple<int, Position, Position, Position, bool>;
using DraftTuple = std::tuple<Position, Position, std::vector<Token>>;
using RuleTuple = std::tuple<int, double, bool, Position>;
using PoolTuple = std::tuple<std::function<int()>, std::function<void(int)>,
                             std::function<Position()>, Position, bool>;

std::vector<Pool> make_pools(const std::vector<PoolTuple>& tuples) {
  std::vector<Pool> pools;
  for (const auto& [allocate, release, available, block_size, prefix_caching] : tuples) {
    pools.push_back({allocate, release, available, block_size, prefix_caching});
  }
  return pools;
}

// What a role's sequence is when it enters, and when it leaves.
struct TrackState {
  int model;
  Position prompt_len, max_len, max_sequence;
  std::vector<Token> ends;
  Position begin;
  std::vector<Token> tokens;
  Position num_computed, context_len;
  std::vector<RowTuple> rows;
  std::vector<int> blocks;
  Position registered, own_from;
};

Track make_track(const TrackState& from, Pool* pool) {
  Track track;
  track.model = from.model;
  track.pool = pool;
  track.prompt_len = from.prompt_len;
  track.max_len = from.max_len;
  track.max_sequence = from.max_sequence;
  track.ends = from.ends;
  std::sort(track.ends.begin(), track.ends.end());
  track.begin = from.begin;
  track.tokens = from.tokens;
  track.num_computed = from.num_computed;
  track.context_len = from.context_len;
  for (const auto& [position, token, top, prob] : from.rows) {
    track.rows.push_back({position, token, top, prob});
  }
  track.blocks = from.blocks;
  track.registered = from.registered;
  track.own_from = from.own_from;
  return track;
}

TrackState state_of(const Track& track) {
  TrackState state{};
  state.begin = track.begin;
  state.tokens = track.tokens;
  state.num_computed = track.num_computed;
  state.context_len = track.context_len;
  state.blocks = track.blocks;
  for (const Row& row : track.rows) {
    state.rows.emplace_back(row.position, row.token, row.top_token, row.top_prob);
  }
  return state;
}

struct LaneState {
  RuleTuple rule;
  std::vector<TrackState> tracks;
  Position output_begin;
  std::vector<Token> output;
  Position max_tokens, draft_len;
  Token vocab;
  std::vector<Token> stop_tokens;
  std::vector<std::string> stops;
  std::string tail;
  bool is_greedy, drafts;
  NeedTuple need;
  std::optional<DraftTuple> draft;
  Address ledger, account;
};

void enter(Lanes& lanes, std::int64_t id, const LaneState& from) {
  auto lane = std::make_unique<Lane>();
  lane->id = id;
  const auto& [writer, threshold, or_equal, lookahead] = from.rule;
  lane->rule = {static_cast<Writer>(writer), threshold, or_equal, lookahead};
  for (const TrackState& track : from.tracks) {
    lane->tracks.push_back(make_track(track, lanes.pool(track.model)));
  }
  lane->output_begin = from.output_begin;
  lane->output = from.output;
  lane->max_tokens = from.max_tokens;
  lane->draft_len = from.draft_len;
  lane->vocab = from.vocab;
  lane->stop_tokens = from.stop_tokens;
  std::sort(lane->stop_tokens.begin(), lane->stop_tokens.end());
  lane->stops = from.stops;
  lane->tail = from.tail;
  lane->is_greedy = from.is_greedy;
  lane->drafts = from.drafts;
  const auto& [role, first, last, ahead, has_ends] = from.need;
  lane->need = {role, first, last, ahead, has_ends};
  if (from.draft) {
    const auto& [start, length, tokens] = *from.draft;
    lane->draft = {true, start, length, tokens};
  }
  std::vector<int> models;
  for (const Track& track : lane->tracks) models.push_back(track.model);
  lane->books = Books(reinterpret_cast<Ledger*>(from.ledger),
                      reinterpret_cast<Account*>(from.account), std::move(models));
  lanes.enter(std::move(lane));
}

// (passes by role, drafted, accepted, cycles)
py::tuple counted(const Lane& lane) {
  std::vector<std::int64_t> passes;
  for (const Track& track : lane.tracks) passes.push_back(track.passes);
  return py::make_tuple(passes, lane.drafted, lane.accepted, lane.cycles);
}

// (tracks, output from output_begin on, output_begin, need, draft)
py::tuple look(const Lane& lane) {
  std::vector<TrackState> tracks;
  for (const Track& track : lane.tracks) tracks.push_back(state_of(track));
  const Need& need = lane.need;
  std::optional<DraftTuple> draft;
  if (lane.draft.exists) {
    draft = DraftTuple{lane.draft.start, lane.draft.length, lane.draft.tokens};
  }
  return py::make_tuple(std::move(tracks), lane.output, lane.output_begin,
                        NeedTuple{need.role, need.first, need.last, need.ahead, need.has_ends},
                        draft);
}

// The tokens that nobody has read yet, and the roles that wrote them.
py::tuple take_written(Lanes& lanes, std::int64_t id) {
  Lane& lane = lanes.at(id);
  const std::vector<Token> tokens(
      lane.output.end() - static_cast<std::ptrdiff_t>(lane.authors.size()), lane.output.end());
  py::list authors;
  for (std::uint8_t author : lane.authors) authors.append(static_cast<int>(author));
  lane.authors.clear();
  return py::make_tuple(tokens, authors);
}

py::tuple held(Lanes& lanes, std::int64_t id) {
  const Lane& lane = lanes.at(id);
  std::vector<std::size_t> blocks;
  for (const Track& track : lane.tracks) blocks.push_back(track.blocks.size());
  return py::make_tuple(lane.written(), blocks);
}

// (lane, role, start, end, first_row, the tokens from start to end, blocks), for who computes rows
// in Python.
py::list spans(const Lanes& lanes) {
  py::list result;
  for (const Item& item : lanes.items()) {
    const Track& track = item.lane->tracks[item.role];
    const auto* tokens = track.tokens.data() + (item.start - track.begin);
    const std::vector<Token> ids(tokens, tokens + (item.end - item.start));
    result.append(py::make_tuple(item.lane->id, item.role, item.start, item.end, item.first_row,
                                 ids, track.blocks, item.lane->vocab));
  }
  return result;
}

// How many answers there are, and the vocabulary of all of them; 0 where they differ.
std::pair<Position, Token> uniform(const Lanes& lanes) {
  Token size = lanes.items().empty() ? 0 : lanes.items().front().lane->vocab;
  for (const Item& item : lanes.items()) {
    if (item.lane->vocab != size) size = 0;
  }
  return {lanes.answers(), size};
}

// The vocabulary of each answer.
std::vector<Token> vocabularies(const Lanes& lanes) {
  std::vector<Token> sizes;
  for (const Item& item : lanes.items()) {
    sizes.insert(sizes.end(), item.end - item.first_row + 1, item.lane->vocab);
  }
  return sizes;
}

using Failed = std::vector<std::tuple<std::int64_t, int, Position, Position>>;

// (answer, lane, role, position) of the answers whose token is not simply the likeliest one.
py::list sampled(const Lanes& lanes) {
  py::list result;
  Position answer = 0;
  for (const Item& item : lanes.items()) {
    for (Position p = item.first_row; p <= item.end; ++p, ++answer) {
      if (!item.lane->is_greedy) {
        result.append(py::make_tuple(answer, item.lane->id, item.role, p));
      }
    }
  }
  return result;
}

// `picked`: the tokens of the sampled answers.
Failed take_statistics(Lanes& lanes, Address argmax, Address max, Address lse,
                       const std::vector<std::pair<Position, Token>>& picked) {
  const auto* tokens = reinterpret_cast<const Token*>(argmax);
  const auto *peaks = reinterpret_cast<const float*>(max),
             *sums = reinterpret_cast<const float*>(lse);
  const auto count = static_cast<std::size_t>(lanes.answers());
  std::vector<Row> said(count);
  std::vector<bool> is_finite(count);
  for (std::size_t i = 0; i < count; ++i) {
    const double peak = peaks[i], sum = sums[i];
    const Token token = tokens[i];
    is_finite[i] = std::isfinite(peak) && !std::isnan(sum);
    said[i] = {0, token, token, std::exp(peak - sum)};
  }
  for (const auto& [answer, token] : picked) said.at(answer).token = token;
  return lanes.take(said, is_finite);
}

Failed take_rows(Lanes& lanes, const std::vector<std::optional<RowTuple>>& rows) {
  std::vector<Row> said;
  std::vector<bool> is_finite;
  for (const auto& row : rows) {
    is_finite.push_back(row.has_value());
    const auto [position, token, top, prob] = row.value_or(RowTuple{});
    said.push_back({position, token, top, prob});
  }
  if (static_cast<Position>(said.size()) != lanes.answers()) {
    throw py::value_error("not as many rows as were asked for");
  }
  return lanes.take(said, is_finite);
}

void bind_states(py::module_& m) {
  py::class_<TrackState>(m, "TrackState")
      .def(py::init([](int model, Position prompt_len, Position max_len, Position max_sequence,
                       std::vector<Token> ends, Position begin, std::vector<Token> tokens,
                       Position num_computed, Position context_len, std::vector<RowTuple> rows,
                       std::vector<int> blocks, Position registered, Position own_from) {
        return TrackState{model,           prompt_len,      max_len,           max_sequence,
                          std::move(ends), begin,           std::move(tokens), num_computed,
                          context_len,     std::move(rows), std::move(blocks), registered,
                          own_from};
      }))
      .def_readonly("begin", &TrackState::begin)
      .def_readonly("tokens", &TrackState::tokens)
      .def_readonly("num_computed", &TrackState::num_computed)
      .def_readonly("context_len", &TrackState::context_len)
      .def_readonly("rows", &TrackState::rows)
      .def_readonly("blocks", &TrackState::blocks);
  py::class_<LaneState>(m, "LaneState")
      .def(py::init([](RuleTuple rule, std::vector<TrackState> tracks, Position output_begin,
                       std::vector<Token> output, Position max_tokens, Position draft_len,
                       Token vocab, std::vector<Token> stop_tokens, std::vector<std::string> stops,
                       py::bytes tail, bool is_greedy, bool drafts, NeedTuple need,
                       std::optional<DraftTuple> draft, Address ledger, Address account) {
        return LaneState{rule,  tracks,      output_begin, output, max_tokens, draft_len,
                         vocab, stop_tokens, stops,        tail,   is_greedy,  drafts,
                         need,  draft,       ledger,       account};
      }));
}

using CurveTuple = std::tuple<double, double, std::vector<std::pair<double, double>>>;

std::unique_ptr<Lanes> make_lanes(
    const std::vector<PoolTuple>& pools,
    std::function<int(std::int64_t, int, std::vector<Token>, int)> register_block,
    TokenBytes token_bytes, PassCost cost,
    std::function<std::optional<CurveTuple>(int)> find_curve) {
  auto put = [register_block](std::int64_t lane, int role, const Token* tokens, Position count,
                              int block) {
    return register_block(lane, role, std::vector<Token>(tokens, tokens + count), block);
  };
  auto find = [find_curve](int model) -> std::optional<Curve> {
    const auto curve = find_curve(model);
    if (!curve) return std::nullopt;
    return Curve{std::get<0>(*curve), std::get<1>(*curve), std::get<2>(*curve)};
  };
  return std::make_unique<Lanes>(make_pools(pools), put, std::move(token_bytes), std::move(cost),
                                 find);
}

// How requests come, go and are looked at.
void bind_passing(py::class_<Lanes>& lanes) {
  lanes.def(py::init(&make_lanes))
      .def("__len__", &Lanes::size)
      .def("enter", &enter)
      .def("leave", [](Lanes& lanes, std::int64_t id) { return look(*lanes.leave(id)); })
      .def("look", [](Lanes& lanes, std::int64_t id) { return look(lanes.at(id)); })
      .def("counted", [](Lanes& lanes, std::int64_t id) { return counted(lanes.at(id)); })
      .def("held", &held)
      .def("take_written", &take_written);
}

// What a step does.
void bind_computing(py::class_<Lanes>& lanes) {
  lanes
      .def("plan",
           [](Lanes& lanes, int model) {
             Plan plan = lanes.plan(model);
             return py::make_tuple(plan.tokens, plan.missing, plan.not_ordinary);
           })
      .def("own", &Lanes::own)
      .def("claims",
           [](const Lanes& lanes, Position headroom_blocks) {
             LaneClaims claims = lanes.claims(headroom_blocks);
             return py::make_tuple(claims.blocks, claims.without_blocks);
           })
      .def("path_lengths", &Lanes::path_lengths)
      .def("ready", &Lanes::ready)
      .def("cap_paths", &Lanes::cap_paths)
      .def(
          "add_foreign",
          [](Lanes& lanes, std::vector<Token> tokens, Position start, Position end,
             Position first_row, Position ahead, std::vector<int> blocks) {
            lanes.add_foreign({std::move(tokens), start, end, first_row, ahead, std::move(blocks)});
          })
      .def("sizes",
           [](const Lanes& lanes, Position block_size) {
             const BatchSizes sizes = lanes.sizes(block_size);
             return py::make_tuple(sizes.rows, sizes.seqs, sizes.width, sizes.answers);
           })
      .def("fill",
           [](const Lanes& lanes, Address memory, Position rows, Position seqs, Position width,
              Position answers, Position block_size, Position spare_slot) {
             lanes.fill(reinterpret_cast<std::uint8_t*>(memory), {rows, seqs, width, answers},
                        block_size, spare_slot);
           })
      .def("spans", &spans)
      .def("uniform", &uniform)
      .def("vocabularies", &vocabularies)
      .def("sampled", &sampled)
      .def("planned", [](const Lanes& lanes) { return lanes.items().size(); })
      .def("tokens", &Lanes::tokens)
      .def("answers", &Lanes::answers)
      .def("take_statistics", &take_statistics)
      .def("take_rows", &take_rows)
      .def("forget_prices", &Lanes::forget_prices)
      .def("onward", &Lanes::onward)
      .def("advance_before", &Lanes::advance_before);
}

}  // namespace

void bind_lanes(py::module_& m) {
  bind_states(m);
  m.attr("DECODE_TOKENS") = DECODE_TOKENS;
  py::class_<Lanes> lanes(m, "Lanes");
  bind_passing(lanes);
  bind_computing(lanes);
}

}  // namespace nudging
