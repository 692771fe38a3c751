// Policies, drafts and commits of one carried request: the twin of policies/solo.py,
// policies/nudging.py, policy_view.py and drafting.py.
#include <algorithm>

#include "nudging/fast_path.h"

namespace nudging {

namespace {

// One step's tokens and who wrote them; none where a row is missing.
struct Step {
  std::vector<Token> tokens;
  int author = BASE;
};

class Run {
 public:
  Run(Carried& carried, World& world) : carried_(carried), world_(world), books_(carried.books) {}

  // Steps until a row is missing; then the need is known.
  void to_next_need() {
    Step step;
    while (decide(step)) commit(step);
    carried_.need = draft_ahead(missing_);
    const Sequence& sequence = carried_.sequences[carried_.need.role];
    if (carried_.need.last + carried_.need.ahead > sequence.max_sequence) throw NeedsPython{};
  }

 private:
  bool decide(Step& step) {
    step.tokens.clear();
    const Rule& rule = carried_.rule;
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
    if (carried_.sequences[role].is_end(token)) throw NeedsPython{};
    step.tokens.push_back(token);
    step.author = role;
    return true;
  }

  // The guide's next word.
  bool decide_word(Step& step) {
    const Position end = context(GUIDE);
    if (!follow(GUIDE, end, carried_.rule.lookahead, step.tokens)) return false;
    if (carried_.sequences[GUIDE].is_end(step.tokens.back())) throw NeedsPython{};
    auto begins_word = [&](Token token) {
      return world_.token_bytes(carried_.id, token)[0] == ' ';
    };
    step.tokens.erase(std::find_if(step.tokens.begin() + 1, step.tokens.end(), begins_word),
                      step.tokens.end());
    step.author = GUIDE;
    return true;
  }

  // The role's sequence made to begin with prompt + output; its length.
  Position context(int role) {
    Sequence& sequence = carried_.sequences[role];
    const Position known = sequence.context_len - sequence.prompt_len;
    const Token* text = carried_.output.data() + (known - carried_.output_begin);
    books_.rewind(role,
                  sequence.set_context(sequence.context_len, text, carried_.written() - known));
    sequence.context_len = sequence.prompt_len + carried_.written();
    return sequence.context_len;
  }

  const Row* row_at_end(int role) { return row(role, context(role), 0, false); }

  // The row at a position; where it is missing, so are the `ahead` ones behind it.
  const Row* row(int role, Position position, Position ahead, bool has_ends) {
    Sequence& sequence = carried_.sequences[role];
    if (!is_drafting_) books_.ask(world_.prices, role, position);
    const Row* found = sequence.find_row(position);
    if (found == nullptr) {
      sequence.uncompute(position - 1);
      missing_ = {role, position, position, ahead, has_ends};
    }
    return found;
  }

  // The role's own path: until an end of sequence, `length` tokens or its context is full.
  bool follow(int role, Position position, Position length, std::vector<Token>& path) {
    Sequence& sequence = carried_.sequences[role];
    if (position > sequence.max_len) throw NeedsPython{};
    const Position last = std::min(position + length, sequence.max_len + 1);
    path.clear();
    for (Position at = position; at < last; ++at) {
      if (!path.empty()) books_.rewind(role, sequence.set_context(at - 1, &path.back(), 1));
      const Row* found = row(role, at, last - 1 - at, true);
      if (found == nullptr) return false;
      path.push_back(found->token);
      if (sequence.is_end(found->token)) break;
    }
    return true;
  }

  void commit(const Step& step) {
    if (carried_.written() + static_cast<Position>(step.tokens.size()) >= carried_.max_tokens) {
      throw NeedsPython{};
    }
    const auto& stops = carried_.stop_tokens;
    for (Token token : step.tokens) {
      const bool stops_here = std::binary_search(stops.begin(), stops.end(), token);
      if (token < 0 || token >= carried_.vocab || stops_here) throw NeedsPython{};
    }
    if (!carried_.stops.empty()) look_for_stops(step);
    carried_.output.insert(carried_.output.end(), step.tokens.begin(), step.tokens.end());
    carried_.authors.insert(carried_.authors.end(), step.tokens.size(),
                            static_cast<std::uint8_t>(step.author));
  }

  // Bytes are enough to see that no stop string is complete; where one may be, Python cuts the
  // text.
  void look_for_stops(const Step& step) {
    std::string seen = carried_.tail;
    for (Token token : step.tokens) seen += world_.token_bytes(carried_.id, token);
    std::size_t longest = 0;
    for (const std::string& stop : carried_.stops) {
      if (seen.find(stop) != std::string::npos) throw NeedsPython{};
      longest = std::max(longest, stop.size());
    }
    carried_.tail = seen.substr(seen.size() - std::min(seen.size(), longest - 1));
  }

  // The need itself, or with a draft behind it, or the row that a draft waits for.
  Need draft_ahead(Need need) {
    for (Sequence& sequence : carried_.sequences)
      sequence.forget_rows_before(sequence.prompt_len + carried_.written());
    if (!is_draftable(need)) {
      books_.share(world_.prices, world_.sharers);
      books_.plan(
          books_.price(world_.prices, need.role, to_compute(need), need.last - need.first + 1));
      return need;
    }
    Draft& draft = carried_.draft;
    if (!draft.exists || draft.start != carried_.written()) {
      settle_draft();
      books_.share(world_.prices, world_.sharers);
      draft = {true, carried_.written(), 0, {}};
      draft.length = draft_length(need);
    }
    if (draft.length > 0 && draft.tokens.empty() && !propose(need)) return missing_;
    const Position last = need.first + static_cast<Position>(draft.tokens.size());
    return {need.role, need.first, std::min(last, carried_.sequences[need.role].max_len), 0, false};
  }

  bool is_draftable(const Need& need) const {
    if (!carried_.drafts || need.role != BASE) return false;
    return need.first == carried_.sequences[BASE].prompt_len + carried_.written();
  }

  Position to_compute(const Need& need) const {
    return need.last - carried_.sequences[need.role].num_computed;
  }

  // What the caller fixed, or what pays; then its cost is planned.
  Position draft_length(const Need& need) {
    const Position limit = carried_.max_tokens - carried_.written() - 1;
    if (carried_.draft_len >= 0) return std::min(carried_.draft_len, limit);
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
    const Sequence& sequence = carried_.sequences[GUIDE];
    Position at = position;
    while (const Row* row = sequence.find_row(at)) {
      ++at;
      if (at > sequence.length() || sequence.token_at(at - 1) != row->token) break;
    }
    return {GUIDE, at - position, std::max<Position>(at - sequence.num_computed, 1)};
  }

  // The guide's own continuation as the draft; false where a row of it is missing.
  bool propose(const Need& need) {
    Draft& draft = carried_.draft;
    std::vector<Token> path;
    // To the end of the run: behind a draft nothing is asked for.
    is_drafting_ = true;
    if (!follow(GUIDE, context(GUIDE), draft.length, path)) return false;
    const Sequence& guide = carried_.sequences[GUIDE];
    auto is_end = [&](Token token) { return guide.is_end(token); };
    path.erase(std::remove_if(path.begin(), path.end(), is_end), path.end());
    draft.tokens = std::move(path);
    carried_.drafted += static_cast<std::int64_t>(draft.tokens.size());
    carried_.sequences[need.role].set_context(need.first, draft.tokens.data(),
                                              static_cast<Position>(draft.tokens.size()));
    return true;
  }

  // Count how much of the last draft became text.
  void settle_draft() {
    const Draft& draft = carried_.draft;
    if (!draft.exists || draft.tokens.empty()) return;
    const Position written = carried_.written() - draft.start;
    const Position known = std::min(written, static_cast<Position>(draft.tokens.size()));
    const Token* text = carried_.output.data() + (draft.start - carried_.output_begin);
    const auto differs = std::mismatch(text, text + known, draft.tokens.begin());
    const std::int64_t accepted = differs.first - text;
    carried_.accepted += accepted;
    ++carried_.cycles[accepted];
    books_.learn(known, accepted);
  }

  Carried& carried_;
  World& world_;
  Books& books_;
  bool is_drafting_ = false;
  Need missing_{};
};

}  // namespace

void advance(Carried& carried, World& world) { Run(carried, world).to_next_need(); }

}  // namespace nudging
