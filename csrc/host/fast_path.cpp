// What the carried requests need of each model, and what becomes of the answers: the twin of
// scheduler.py and engine.py.
#include "nudging/fast_path.h"

#include <algorithm>
#include <stdexcept>

namespace nudging {

FastPath::FastPath(std::vector<Pool> pools, Register register_block, TokenBytes token_bytes,
                   PassCost cost, FindCurve find)
    : pools_(std::move(pools)),
      register_(std::move(register_block)),
      world_{std::move(token_bytes), Prices(std::move(cost), std::move(find), pools_.size()), {}} {}

Carried& FastPath::enter(std::unique_ptr<Carried> carried) {
  const std::int64_t id = carried->id;
  return *(fast_path_[id] = std::move(carried));
}

Carried& FastPath::at(std::int64_t id) {
  const auto found = fast_path_.find(id);
  if (found == fast_path_.end()) throw std::out_of_range("no such carried");
  return *found->second;
}

std::unique_ptr<Carried> FastPath::leave(std::int64_t id) {
  Carried& carried = at(id);
  auto is_its = [&](const Item& item) { return item.carried == &carried; };
  items_.erase(std::remove_if(items_.begin(), items_.end(), is_its), items_.end());
  planned_.erase(std::remove(planned_.begin(), planned_.end(), id), planned_.end());
  auto node = fast_path_.extract(id);
  return std::move(node.mapped());
}

Plan FastPath::plan(int model) {
  Plan plan;
  items_.clear();
  foreign_.clear();
  for (auto& [id, carried] : fast_path_) {
    const Need& need = carried->need;
    const Sequence& sequence = carried->sequences[need.role];
    if (sequence.model != model) continue;
    const Pool& pool = *sequence.pool;
    const auto owned = static_cast<Position>(sequence.blocks.size());
    const bool is_whole = sequence.num_computed == sequence.registered * pool.block_size &&
                          owned == sequence.registered;
    const bool may_find = pool.prefix_caching && is_whole &&
                          sequence.num_computed + pool.block_size <= need.first - 1;
    if (may_find || need.last - sequence.num_computed > DECODE_TOKENS) {
      plan.not_ordinary.push_back(id);
      continue;
    }
    items_.push_back(
        {carried.get(), need.role, sequence.num_computed, need.last, need.first, need.ahead});
    plan.tokens += need.last - sequence.num_computed;
    plan.missing += std::max<Position>(pool.blocks_for(need.last + need.ahead) - owned, 0);
  }
  return plan;
}

std::vector<std::int64_t> FastPath::own() {
  std::vector<std::int64_t> failed;
  planned_.clear();
  auto lacks = [&](const Item& item) {
    const bool owns = item.carried->sequences[item.role].grow(item.end);
    (owns ? planned_ : failed).push_back(item.carried->id);
    return !owns;
  };
  std::vector<Item> kept;
  for (const Item& item : items_) {
    if (!lacks(item)) kept.push_back(item);
  }
  items_ = std::move(kept);
  return failed;
}

CarriedClaims FastPath::claims(Position headroom_blocks) const {
  CarriedClaims claims;
  claims.blocks.resize(pools_.size());
  for (const auto& [id, carried] : fast_path_) {
    for (std::size_t role = 0; role < carried->sequences.size(); ++role) {
      const Sequence& sequence = carried->sequences[role];
      const Position context = sequence.prompt_len + carried->written();
      const Position soon =
          context + carried->ahead() + headroom_blocks * sequence.pool->block_size;
      const Position wanted = sequence.pool->blocks_for(std::min(soon, sequence.max_sequence));
      const auto held = static_cast<Position>(sequence.blocks.size());
      claims.blocks[sequence.model] += std::max<Position>(wanted - held, 0);
      if (held == 0) claims.without_blocks.emplace_back(id, static_cast<int>(role));
    }
  }
  return claims;
}

std::vector<Position> FastPath::path_lengths() const {
  std::vector<Position> lengths;
  for (const Item& item : items_) lengths.push_back(item.ahead + 1);
  return lengths;
}

Position FastPath::ready(int model) const {
  return std::count_if(fast_path_.begin(), fast_path_.end(), [&](const auto& entry) {
    const Carried& carried = *entry.second;
    return carried.sequences[carried.need.role].model == model;
  });
}

void FastPath::cap_paths(Position steps, Position running) {
  for (Item& item : items_) item.ahead = path_ahead(item, steps, running);
}

Position FastPath::path_ahead(const Item& item, Position steps, Position running) {
  const Position wanted = std::min(item.ahead, steps - 1);
  const Carried& carried = *item.carried;
  const bool is_drafting = carried.draft_len < 0 && carried.drafts && item.role == GUIDE;
  if (steps == 1 || !is_drafting || carried.rule.lookahead == 0) return wanted;
  const Sequence& sequence = carried.sequences[item.role];
  const Position end =
      sequence.prompt_len + carried.written() + carried.rule.lookahead + MAX_ADAPTIVE_DRAFT;
  const Position room = std::min(end, sequence.max_sequence) - item.end;
  const Position affordable = carried.books.affordable_rows(world_.prices, item.role, running);
  return std::max(wanted, std::min({steps - 1, room, affordable}));
}

Position FastPath::tokens() const {
  Position sum = 0;
  for (const Item& item : items_) sum += item.end - item.start;
  return sum;
}

Position FastPath::answers() const {
  Position sum = 0;
  for (const Item& item : items_) sum += item.end - item.first_row + 1;
  return sum;
}

std::vector<std::tuple<std::int64_t, int, Position, Position>> FastPath::take(
    const std::vector<Row>& said, const std::vector<bool>& is_finite) {
  std::vector<std::tuple<std::int64_t, int, Position, Position>> failed;
  Position answer = 0;
  for (const Item& item : items_) {
    Carried& carried = *item.carried;
    Sequence& sequence = carried.sequences[item.role];
    carried.books.pay(world_.prices, item.role, item.end - item.start,
                      item.end - item.first_row + 1);
    sequence.num_computed = item.end;
    ++sequence.passes;
    bool has_failed = false;
    for (Position position = item.first_row; position <= item.end; ++position, ++answer) {
      if (is_finite[answer]) {
        sequence.put_row(
            {position, said[answer].token, said[answer].top_token, said[answer].top_prob});
      } else {
        has_failed = true;
        failed.emplace_back(carried.id, item.role, position, answer);
      }
    }
    if (!has_failed) register_blocks(carried, item.role, sequence);
  }
  return failed;
}

void FastPath::register_blocks(const Carried& carried, int role, Sequence& sequence) {
  const Pool& pool = *sequence.pool;
  if (!pool.prefix_caching) return;
  const Position full = std::min(sequence.num_computed, sequence.context_len) / pool.block_size;
  for (; sequence.registered < full; ++sequence.registered) {
    const Token* tokens =
        sequence.tokens.data() + (sequence.registered * pool.block_size - sequence.begin);
    int& block = sequence.blocks[sequence.registered];
    block = register_(carried.id, role, tokens, pool.block_size, block);
  }
}

bool FastPath::onward() {
  std::vector<Item> next;
  foreign_.clear();
  for (const Item& item : items_) {
    if (item.ahead == 0) continue;
    Sequence& sequence = item.carried->sequences[item.role];
    const Row* row = sequence.find_row(item.end);
    const bool ends = row != nullptr && item.carried->need.has_ends && sequence.is_end(row->token);
    if (row == nullptr || ends) continue;
    const Token token = row->token;
    item.carried->books.rewind(item.role, sequence.set_context(item.end, &token, 1));
    // Without a block, the rest becomes a need of its own.
    const bool has_block =
        sequence.pool->blocks_for(item.end + 1) <= static_cast<Position>(sequence.blocks.size());
    if (!has_block && (sequence.pool->available() == 0 || !sequence.grow(item.end + 1))) continue;
    next.push_back({item.carried, item.role, item.end, item.end + 1, item.end + 1, item.ahead - 1});
  }
  items_ = std::move(next);
  return !items_.empty();
}

std::pair<std::vector<std::int64_t>, std::optional<std::int64_t>> FastPath::advance_before(
    std::int64_t limit, std::vector<double> sharers) {
  world_.sharers = std::move(sharers);
  std::vector<std::int64_t> moved;
  auto next = planned_.begin();
  for (; next != planned_.end() && *next < limit; ++next) {
    try {
      advance(at(*next), world_);
      moved.push_back(*next);
    } catch (const NeedsPython&) {
      const std::int64_t back = *next;
      planned_.erase(planned_.begin(), next + 1);
      return {std::move(moved), back};
    }
  }
  planned_.erase(planned_.begin(), next);
  return {std::move(moved), std::nullopt};
}

}  // namespace nudging
