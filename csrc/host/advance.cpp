// Policies, drafts and commits of one lane: the twin of policies/solo.py, policies/nudging.py,
// view.py and draft.py.
#include <algorithm>

#include "nudging/lanes.h"

namespace nudging {

namespace {

// One step's tokens and who wrote them; none where a row is missing.
struct Step {
  std::vector<Token> tokens;
  int author = BASE;
};

class Run {
 public:
  Run(Lane& lane, World& world) : lane_(lane), world_(world), books_(lane.books) {}

  // Steps until a row is missing; then the need is known.
  void to_next_need() {
    Step step;
    while (decide(step)) commit(step);
    lane_.need = draft_ahead(missing_);
    const Track& track = lane_.tracks[lane_.need.role];
    if (lane_.need.last + lane_.need.ahead > track.max_sequence) throw NotOrdinary{};
  }

 private:
  bool decide(Step& step) {
    step.tokens.clear();
    const Rule& rule = lane_.rule;
    if (rule.writer == Writer::solo) return decide_token(step, BASE);
    if (rule.threshold <= 1) {
      const Row* row = row_at_end(BASE);
      if (row == nullptr) return false;
      if (!rule.unsure(row->top_prob)) return write(step, BASE, row->token);
    }
    return rule.writer == Writer::token ? decide_token(step, GUIDE) : decide_word(step);
  }

  bool decide_token(Step& step, int role) {
    const Row* row = row_at_end(role);
    return row != nullptr && write(step, role, row->token);
  }

  bool write(Step& step, int role, Token token) {
    if (lane_.tracks[role].is_end(token)) throw NotOrdinary{};
    step.tokens.push_back(token);
    step.author = role;
    return true;
  }

  // The guide's next word.
  bool decide_word(Step& step) {
    const Position end = context(GUIDE);
    if (!follow(GUIDE, end, lane_.rule.lookahead, step.tokens)) return false;
    if (lane_.tracks[GUIDE].is_end(step.tokens.back())) throw NotOrdinary{};
    auto begins_word = [&](Token token) { return world_.token_bytes(lane_.id, token)[0] == ' '; };
    step.tokens.erase(std::find_if(step.tokens.begin() + 1, step.tokens.end(), begins_word),
                      step.tokens.end());
    step.author = GUIDE;
    return true;
  }

  // The role's sequence made to begin with prompt + output; its length.
  Position context(int role) {
    Track& track = lane_.tracks[role];
    const Position known = track.context_len - track.prompt_len;
    const Token* text = lane_.output.data() + (known - lane_.output_begin);
    books_.rewind(role, track.set_context(track.context_len, text, lane_.written() - known));
    track.context_len = track.prompt_len + lane_.written();
    return track.context_len;
  }

  const Row* row_at_end(int role) { return row(role, context(role), 0, false); }

  // The row at a position; where it is missing, so are the `ahead` ones behind it.
  const Row* row(int role, Position position, Position ahead, bool has_ends) {
    Track& track = lane_.tracks[role];
    if (!is_drafting_) books_.ask(world_.prices, role, position);
    const Row* found = track.find_row(position);
    if (found == nullptr) {
      track.uncompute(position - 1);
      missing_ = {role, position, position, ahead, has_ends};
    }
    return found;
  }

  // The role's own path: until an end of sequence, `length` tokens or its context is full.
  bool follow(int role, Position position, Position length, std::vector<Token>& path) {
    Track& track = lane_.tracks[role];
    if (position > track.max_len) throw NotOrdinary{};
    const Position last = std::min(position + length, track.max_len + 1);
    path.clear();
    for (Position at = position; at < last; ++at) {
      if (!path.empty()) books_.rewind(role, track.set_context(at - 1, &path.back(), 1));
      const Row* found = row(role, at, last - 1 - at, true);
      if (found == nullptr) return false;
      path.push_back(found->token);
      if (track.is_end(found->token)) break;
    }
    return true;
  }

  void commit(const Step& step) {
    if (lane_.written() + static_cast<Position>(step.tokens.size()) >= lane_.max_tokens) {
      throw NotOrdinary{};
    }
    const auto& stops = lane_.stop_tokens;
    for (Token token : step.tokens) {
      const bool stops_here = std::binary_search(stops.begin(), stops.end(), token);
      if (token < 0 || token >= lane_.vocab || stops_here) throw NotOrdinary{};
    }
    if (!lane_.stops.empty()) look_for_stops(step);
    lane_.output.insert(lane_.output.end(), step.tokens.begin(), step.tokens.end());
    lane_.authors.insert(lane_.authors.end(), step.tokens.size(),
                         static_cast<std::uint8_t>(step.author));
  }

  // Bytes are enough to see that no stop string is complete; where one may be, Python cuts the
  // text.
  void look_for_stops(const Step& step) {
    std::string seen = lane_.tail;
    for (Token token : step.tokens) seen += world_.token_bytes(lane_.id, token);
    std::size_t longest = 0;
    for (const std::string& stop : lane_.stops) {
      if (seen.find(stop) != std::string::npos) throw NotOrdinary{};
      longest = std::max(longest, stop.size());
    }
    lane_.tail = seen.substr(seen.size() - std::min(seen.size(), longest - 1));
  }

  // The need itself, or with a draft behind it, or the row that a draft waits for.
  Need draft_ahead(Need need) {
    for (Track& track : lane_.tracks) track.forget_rows_before(track.prompt_len + lane_.written());
    if (!is_draftable(need)) {
      books_.share(world_.prices, world_.sharers);
      books_.plan(
          books_.price(world_.prices, need.role, to_compute(need), need.last - need.first + 1));
      return need;
    }
    Draft& draft = lane_.draft;
    if (!draft.exists || draft.start != lane_.written()) {
      settle_draft();
      books_.share(world_.prices, world_.sharers);
      draft = {true, lane_.written(), 0, {}};
      draft.length = draft_length(need);
    }
    if (draft.length > 0 && draft.tokens.empty() && !propose(need)) return missing_;
    const Position last = need.first + static_cast<Position>(draft.tokens.size());
    return {need.role, need.first, std::min(last, lane_.tracks[need.role].max_len), 0, false};
  }

  bool is_draftable(const Need& need) const {
    if (!lane_.drafts || need.role != BASE) return false;
    return need.first == lane_.tracks[BASE].prompt_len + lane_.written();
  }

  Position to_compute(const Need& need) const {
    return need.last - lane_.tracks[need.role].num_computed;
  }

  // What the caller fixed, or what pays; then its cost is planned.
  Position draft_length(const Need& need) {
    const Position limit = lane_.max_tokens - lane_.written() - 1;
    if (lane_.draft_len >= 0) return std::min(lane_.draft_len, limit);
    const Position rows = to_compute(need);
    const Drafting drafting = known_path();
    Prices& prices = world_.prices;
    const Position length = books_.draft_length(prices, need.role, rows, drafting, limit);
    const double read = books_.price(prices, need.role, rows + length, 1 + length);
    books_.plan(books_.drafting_cost(prices, drafting, length) + read);
    return length;
  }

  // How much of the guide's own path behind the text is known, and what it has to read for one
  // token more.
  Drafting known_path() {
    const Position position = context(GUIDE);
    const Track& track = lane_.tracks[GUIDE];
    Position at = position;
    while (const Row* row = track.find_row(at)) {
      ++at;
      if (at > track.length() || track.token_at(at - 1) != row->token) break;
    }
    return {GUIDE, at - position, std::max<Position>(at - track.num_computed, 1)};
  }

  // The guide's own continuation as the draft; false where a row of it is missing.
  bool propose(const Need& need) {
    Draft& draft = lane_.draft;
    std::vector<Token> path;
    // To the end of the run: behind a draft nothing is asked for.
    is_drafting_ = true;
    if (!follow(GUIDE, context(GUIDE), draft.length, path)) return false;
    const Track& guide = lane_.tracks[GUIDE];
    auto is_end = [&](Token token) { return guide.is_end(token); };
    path.erase(std::remove_if(path.begin(), path.end(), is_end), path.end());
    draft.tokens = std::move(path);
    lane_.drafted += static_cast<std::int64_t>(draft.tokens.size());
    lane_.tracks[need.role].set_context(need.first, draft.tokens.data(),
                                        static_cast<Position>(draft.tokens.size()));
    return true;
  }

  // Count how much of the last draft became text.
  void settle_draft() {
    const Draft& draft = lane_.draft;
    if (!draft.exists || draft.tokens.empty()) return;
    const Position written = lane_.written() - draft.start;
    const Position known = std::min(written, static_cast<Position>(draft.tokens.size()));
    const Token* text = lane_.output.data() + (draft.start - lane_.output_begin);
    const auto differs = std::mismatch(text, text + known, draft.tokens.begin());
    const std::int64_t accepted = differs.first - text;
    lane_.accepted += accepted;
    ++lane_.cycles[accepted];
    books_.learn(known, accepted);
  }

  Lane& lane_;
  World& world_;
  Books& books_;
  bool is_drafting_ = false;
  Need missing_{};
};

}  // namespace

void advance(Lane& lane, World& world) { Run(lane, world).to_next_need(); }

}  // namespace nudging
