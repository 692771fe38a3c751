// The Python face of the fast path.
#include "bind_fast_path.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "nudging/fast_path.h"

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
struct SequenceState {
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

Sequence make_sequence(const SequenceState& from, Pool* pool) {
  Sequence sequence;
  sequence.model = from.model;
  sequence.pool = pool;
  sequence.prompt_len = from.prompt_len;
  sequence.max_len = from.max_len;
  sequence.max_sequence = from.max_sequence;
  sequence.ends = from.ends;
  std::sort(sequence.ends.begin(), sequence.ends.end());
  sequence.begin = from.begin;
  sequence.tokens = from.tokens;
  sequence.num_computed = from.num_computed;
  sequence.context_len = from.context_len;
  for (const auto& [position, token, top, prob] : from.rows) {
    sequence.rows.push_back({position, token, top, prob});
  }
  sequence.blocks = from.blocks;
  sequence.registered = from.registered;
  sequence.own_from = from.own_from;
  return sequence;
}

SequenceState state_of(const Sequence& sequence) {
  SequenceState state{};
  state.begin = sequence.begin;
  state.tokens = sequence.tokens;
  state.num_computed = sequence.num_computed;
  state.context_len = sequence.context_len;
  state.blocks = sequence.blocks;
  for (const Row& row : sequence.rows) {
    state.rows.emplace_back(row.position, row.token, row.top_token, row.top_prob);
  }
  return state;
}

struct CarriedState {
  RuleTuple rule;
  std::vector<SequenceState> sequences;
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

void enter(FastPath& fast_path, std::int64_t id, const CarriedState& from) {
  auto carried = std::make_unique<Carried>();
  carried->id = id;
  const auto& [writer, threshold, or_equal, lookahead] = from.rule;
  carried->rule = {static_cast<Writer>(writer), threshold, or_equal, lookahead};
  for (const SequenceState& sequence : from.sequences) {
    carried->sequences.push_back(make_sequence(sequence, fast_path.pool(sequence.model)));
  }
  carried->output_begin = from.output_begin;
  carried->output = from.output;
  carried->max_tokens = from.max_tokens;
  carried->draft_len = from.draft_len;
  carried->vocab = from.vocab;
  carried->stop_tokens = from.stop_tokens;
  std::sort(carried->stop_tokens.begin(), carried->stop_tokens.end());
  carried->stops = from.stops;
  carried->tail = from.tail;
  carried->is_greedy = from.is_greedy;
  carried->drafts = from.drafts;
  const auto& [role, first, last, ahead, has_ends] = from.need;
  carried->need = {role, first, last, ahead, has_ends};
  if (from.draft) {
    const auto& [start, length, tokens] = *from.draft;
    carried->draft = {true, start, length, tokens};
  }
  std::vector<int> models;
  for (const Sequence& sequence : carried->sequences) models.push_back(sequence.model);
  carried->books = Books(reinterpret_cast<Ledger*>(from.ledger),
                         reinterpret_cast<Account*>(from.account), std::move(models));
  fast_path.enter(std::move(carried));
}

// (passes by role, drafted, accepted, cycles)
py::tuple counted(const Carried& carried) {
  std::vector<std::int64_t> passes;
  for (const Sequence& sequence : carried.sequences) passes.push_back(sequence.passes);
  return py::make_tuple(passes, carried.drafted, carried.accepted, carried.cycles);
}

// (sequences, output from output_begin on, output_begin, need, draft)
py::tuple look(const Carried& carried) {
  std::vector<SequenceState> sequences;
  for (const Sequence& sequence : carried.sequences) sequences.push_back(state_of(sequence));
  const Need& need = carried.need;
  std::optional<DraftTuple> draft;
  if (carried.draft.exists) {
    draft = DraftTuple{carried.draft.start, carried.draft.length, carried.draft.tokens};
  }
  return py::make_tuple(std::move(sequences), carried.output, carried.output_begin,
                        NeedTuple{need.role, need.first, need.last, need.ahead, need.has_ends},
                        draft);
}

// The tokens that nobody has read yet, and the roles that wrote them.
py::tuple take_written(FastPath& fast_path, std::int64_t id) {
  Carried& carried = fast_path.at(id);
  const std::vector<Token> tokens(
      carried.output.end() - static_cast<std::ptrdiff_t>(carried.authors.size()),
      carried.output.end());
  py::list authors;
  for (std::uint8_t author : carried.authors) authors.append(static_cast<int>(author));
  carried.authors.clear();
  return py::make_tuple(tokens, authors);
}

py::tuple held(FastPath& fast_path, std::int64_t id) {
  const Carried& carried = fast_path.at(id);
  std::vector<std::size_t> blocks;
  for (const Sequence& sequence : carried.sequences) blocks.push_back(sequence.blocks.size());
  return py::make_tuple(carried.written(), blocks);
}

// (carried, role, start, end, first_row, the tokens from start to end, blocks), for who computes
// rows in Python.
py::list spans(const FastPath& fast_path) {
  py::list result;
  for (const Item& item : fast_path.items()) {
    const Sequence& sequence = item.carried->sequences[item.role];
    const auto* tokens = sequence.tokens.data() + (item.start - sequence.begin);
    const std::vector<Token> ids(tokens, tokens + (item.end - item.start));
    result.append(py::make_tuple(item.carried->id, item.role, item.start, item.end, item.first_row,
                                 ids, sequence.blocks, item.carried->vocab));
  }
  return result;
}

// How many answers there are, and the vocabulary of all of them; 0 where they differ.
std::pair<Position, Token> uniform(const FastPath& fast_path) {
  Token size = fast_path.items().empty() ? 0 : fast_path.items().front().carried->vocab;
  for (const Item& item : fast_path.items()) {
    if (item.carried->vocab != size) size = 0;
  }
  return {fast_path.answers(), size};
}

// The vocabulary of each answer.
std::vector<Token> vocabularies(const FastPath& fast_path) {
  std::vector<Token> sizes;
  for (const Item& item : fast_path.items()) {
    sizes.insert(sizes.end(), item.end - item.first_row + 1, item.carried->vocab);
  }
  return sizes;
}

using Failed = std::vector<std::tuple<std::int64_t, int, Position, Position>>;

// (answer, carried, role, position) of the answers whose token is not simply the likeliest one.
py::list sampled(const FastPath& fast_path) {
  py::list result;
  Position answer = 0;
  for (const Item& item : fast_path.items()) {
    for (Position p = item.first_row; p <= item.end; ++p, ++answer) {
      if (!item.carried->is_greedy) {
        result.append(py::make_tuple(answer, item.carried->id, item.role, p));
      }
    }
  }
  return result;
}

// `picked`: the tokens of the sampled answers.
Failed take_statistics(FastPath& fast_path, Address argmax, Address max, Address lse,
                       const std::vector<std::pair<Position, Token>>& picked) {
  const auto* tokens = reinterpret_cast<const Token*>(argmax);
  const auto *peaks = reinterpret_cast<const float*>(max),
             *sums = reinterpret_cast<const float*>(lse);
  const auto count = static_cast<std::size_t>(fast_path.answers());
  std::vector<Row> said(count);
  std::vector<bool> is_finite(count);
  for (std::size_t i = 0; i < count; ++i) {
    const double peak = peaks[i], sum = sums[i];
    const Token token = tokens[i];
    is_finite[i] = std::isfinite(peak) && !std::isnan(sum);
    said[i] = {0, token, token, std::exp(peak - sum)};
  }
  for (const auto& [answer, token] : picked) said.at(answer).token = token;
  return fast_path.take(said, is_finite);
}

Failed take_rows(FastPath& fast_path, const std::vector<std::optional<RowTuple>>& rows) {
  std::vector<Row> said;
  std::vector<bool> is_finite;
  for (const auto& row : rows) {
    is_finite.push_back(row.has_value());
    const auto [position, token, top, prob] = row.value_or(RowTuple{});
    said.push_back({position, token, top, prob});
  }
  if (static_cast<Position>(said.size()) != fast_path.answers()) {
    throw py::value_error("not as many rows as were asked for");
  }
  return fast_path.take(said, is_finite);
}

void bind_states(py::module_& m) {
  py::class_<SequenceState>(m, "SequenceState")
      .def(py::init([](int model, Position prompt_len, Position max_len, Position max_sequence,
                       std::vector<Token> ends, Position begin, std::vector<Token> tokens,
                       Position num_computed, Position context_len, std::vector<RowTuple> rows,
                       std::vector<int> blocks, Position registered, Position own_from) {
        return SequenceState{model,           prompt_len,      max_len,           max_sequence,
                             std::move(ends), begin,           std::move(tokens), num_computed,
                             context_len,     std::move(rows), std::move(blocks), registered,
                             own_from};
      }))
      .def_readonly("begin", &SequenceState::begin)
      .def_readonly("tokens", &SequenceState::tokens)
      .def_readonly("num_computed", &SequenceState::num_computed)
      .def_readonly("context_len", &SequenceState::context_len)
      .def_readonly("rows", &SequenceState::rows)
      .def_readonly("blocks", &SequenceState::blocks);
  py::class_<CarriedState>(m, "CarriedState")
      .def(py::init([](RuleTuple rule, std::vector<SequenceState> sequences, Position output_begin,
                       std::vector<Token> output, Position max_tokens, Position draft_len,
                       Token vocab, std::vector<Token> stop_tokens, std::vector<std::string> stops,
                       py::bytes tail, bool is_greedy, bool drafts, NeedTuple need,
                       std::optional<DraftTuple> draft, Address ledger, Address account) {
        return CarriedState{rule,  sequences,   output_begin, output, max_tokens, draft_len,
                            vocab, stop_tokens, stops,        tail,   is_greedy,  drafts,
                            need,  draft,       ledger,       account};
      }));
}

using CurveTuple = std::tuple<double, double, std::vector<std::pair<double, double>>>;

std::unique_ptr<FastPath> make_fast_path(
    const std::vector<PoolTuple>& pools,
    std::function<int(std::int64_t, int, std::vector<Token>, int)> register_block,
    TokenBytes token_bytes, PassCost cost,
    std::function<std::optional<CurveTuple>(int)> find_curve) {
  auto put = [register_block](std::int64_t carried, int role, const Token* tokens, Position count,
                              int block) {
    return register_block(carried, role, std::vector<Token>(tokens, tokens + count), block);
  };
  auto find = [find_curve](int model) -> std::optional<Curve> {
    const auto curve = find_curve(model);
    if (!curve) return std::nullopt;
    return Curve{std::get<0>(*curve), std::get<1>(*curve), std::get<2>(*curve)};
  };
  return std::make_unique<FastPath>(make_pools(pools), put, std::move(token_bytes), std::move(cost),
                                    find);
}

// How requests come, go and are looked at.
void bind_passing(py::class_<FastPath>& fast_path) {
  fast_path.def(py::init(&make_fast_path))
      .def("__len__", &FastPath::size)
      .def("enter", &enter)
      .def("leave", [](FastPath& fast_path, std::int64_t id) { return look(*fast_path.leave(id)); })
      .def("look", [](FastPath& fast_path, std::int64_t id) { return look(fast_path.at(id)); })
      .def("counted",
           [](FastPath& fast_path, std::int64_t id) { return counted(fast_path.at(id)); })
      .def("held", &held)
      .def("take_written", &take_written);
}

// What a step does.
void bind_computing(py::class_<FastPath>& fast_path) {
  fast_path
      .def("plan",
           [](FastPath& fast_path, int model) {
             Plan plan = fast_path.plan(model);
             return py::make_tuple(plan.tokens, plan.missing, plan.not_ordinary);
           })
      .def("own", &FastPath::own)
      .def("claims",
           [](const FastPath& fast_path, Position headroom_blocks) {
             CarriedClaims claims = fast_path.claims(headroom_blocks);
             return py::make_tuple(claims.blocks, claims.without_blocks);
           })
      .def("path_lengths", &FastPath::path_lengths)
      .def("ready", &FastPath::ready)
      .def("cap_paths", &FastPath::cap_paths)
      .def("add_foreign",
           [](FastPath& fast_path, std::vector<Token> tokens, Position start, Position end,
              Position first_row, Position ahead, std::vector<int> blocks) {
             fast_path.add_foreign(
                 {std::move(tokens), start, end, first_row, ahead, std::move(blocks)});
           })
      .def("sizes",
           [](const FastPath& fast_path, Position block_size) {
             const BatchSizes sizes = fast_path.sizes(block_size);
             return py::make_tuple(sizes.rows, sizes.seqs, sizes.width, sizes.answers);
           })
      .def("fill",
           [](const FastPath& fast_path, Address memory, Position rows, Position seqs,
              Position width, Position answers, Position block_size, Position spare_slot) {
             fast_path.fill(reinterpret_cast<std::uint8_t*>(memory), {rows, seqs, width, answers},
                            block_size, spare_slot);
           })
      .def("spans", &spans)
      .def("uniform", &uniform)
      .def("vocabularies", &vocabularies)
      .def("sampled", &sampled)
      .def("planned", [](const FastPath& fast_path) { return fast_path.items().size(); })
      .def("tokens", &FastPath::tokens)
      .def("answers", &FastPath::answers)
      .def("take_statistics", &take_statistics)
      .def("take_rows", &take_rows)
      .def("forget_prices", &FastPath::forget_prices)
      .def("onward", &FastPath::onward)
      .def("advance_before", &FastPath::advance_before);
}

}  // namespace

void bind_fast_path(py::module_& m) {
  bind_states(m);
  m.attr("DECODE_TOKENS") = DECODE_TOKENS;
  py::class_<FastPath> fast_path(m, "FastPath");
  bind_passing(fast_path);
  bind_computing(fast_path);
}

}  // namespace nudging
