// What the lanes need of each model, and what becomes of the answers: the twin of scheduler.py and
// engine.py.
#include "nudging/lanes.h"

#include <algorithm>
#include <stdexcept>

namespace nudging {

Lanes::Lanes(std::vector<Pool> pools, Register register_block, TokenBytes token_bytes,
             PassCost cost, FindCurve find)
    : pools_(std::move(pools)),
      register_(std::move(register_block)),
      world_{std::move(token_bytes), Prices(std::move(cost), std::move(find), pools_.size()), {}} {}

Lane& Lanes::enter(std::unique_ptr<Lane> lane) {
  const std::int64_t id = lane->id;
  return *(lanes_[id] = std::move(lane));
}

Lane& Lanes::at(std::int64_t id) {
  const auto found = lanes_.find(id);
  if (found == lanes_.end()) throw std::out_of_range("no such lane");
  return *found->second;
}

std::unique_ptr<Lane> Lanes::leave(std::int64_t id) {
  Lane& lane = at(id);
  auto is_its = [&](const Item& item) { return item.lane == &lane; };
  items_.erase(std::remove_if(items_.begin(), items_.end(), is_its), items_.end());
  planned_.erase(std::remove(planned_.begin(), planned_.end(), id), planned_.end());
  auto node = lanes_.extract(id);
  return std::move(node.mapped());
}

Plan Lanes::plan(int model) {
  Plan plan;
  items_.clear();
  foreign_.clear();
  for (auto& [id, lane] : lanes_) {
    const Need& need = lane->need;
    const Track& track = lane->tracks[need.role];
    if (track.model != model) continue;
    const Pool& pool = *track.pool;
    const auto owned = static_cast<Position>(track.blocks.size());
    const bool is_whole =
        track.num_computed == track.registered * pool.block_size && owned == track.registered;
    const bool may_find =
        pool.prefix_caching && is_whole && track.num_computed + pool.block_size <= need.first - 1;
    if (may_find || need.last - track.num_computed > DECODE_TOKENS) {
      plan.not_ordinary.push_back(id);
      continue;
    }
    items_.push_back(
        {lane.get(), need.role, track.num_computed, need.last, need.first, need.ahead});
    plan.tokens += need.last - track.num_computed;
    plan.missing += std::max<Position>(pool.blocks_for(need.last + need.ahead) - owned, 0);
  }
  return plan;
}

std::vector<std::int64_t> Lanes::own() {
  std::vector<std::int64_t> failed;
  planned_.clear();
  auto lacks = [&](const Item& item) {
    const bool owns = item.lane->tracks[item.role].grow(item.end);
    (owns ? planned_ : failed).push_back(item.lane->id);
    return !owns;
  };
  std::vector<Item> kept;
  for (const Item& item : items_) {
    if (!lacks(item)) kept.push_back(item);
  }
  items_ = std::move(kept);
  return failed;
}

LaneClaims Lanes::claims(Position headroom_blocks) const {
  LaneClaims claims;
  claims.blocks.resize(pools_.size());
  for (const auto& [id, lane] : lanes_) {
    for (std::size_t role = 0; role < lane->tracks.size(); ++role) {
      const Track& track = lane->tracks[role];
      const Position context = track.prompt_len + lane->written();
      const Position soon = context + lane->ahead() + headroom_blocks * track.pool->block_size;
      const Position wanted = track.pool->blocks_for(std::min(soon, track.max_sequence));
      const auto held = static_cast<Position>(track.blocks.size());
      claims.blocks[track.model] += std::max<Position>(wanted - held, 0);
      if (held == 0) claims.without_blocks.emplace_back(id, static_cast<int>(role));
    }
  }
  return claims;
}

std::vector<Position> Lanes::path_lengths() const {
  std::vector<Position> lengths;
  for (const Item& item : items_) lengths.push_back(item.ahead + 1);
  return lengths;
}

Position Lanes::ready(int model) const {
  return std::count_if(lanes_.begin(), lanes_.end(), [&](const auto& entry) {
    const Lane& lane = *entry.second;
    return lane.tracks[lane.need.role].model == model;
  });
}

void Lanes::cap_paths(Position steps, Position running) {
  for (Item& item : items_) item.ahead = path_ahead(item, steps, running);
}

Position Lanes::path_ahead(const Item& item, Position steps, Position running) {
  const Position wanted = std::min(item.ahead, steps - 1);
  const Lane& lane = *item.lane;
  const bool is_drafting = lane.draft_len < 0 && lane.drafts && item.role == GUIDE;
  if (steps == 1 || !is_drafting || lane.rule.lookahead == 0) return wanted;
  const Track& track = lane.tracks[item.role];
  const Position end = track.prompt_len + lane.written() + lane.rule.lookahead + MAX_ADAPTIVE_DRAFT;
  const Position room = std::min(end, track.max_sequence) - item.end;
  const Position affordable = lane.books.affordable_rows(world_.prices, item.role, running);
  return std::max(wanted, std::min({steps - 1, room, affordable}));
}

Position Lanes::tokens() const {
  Position sum = 0;
  for (const Item& item : items_) sum += item.end - item.start;
  return sum;
}

Position Lanes::answers() const {
  Position sum = 0;
  for (const Item& item : items_) sum += item.end - item.first_row + 1;
  return sum;
}

std::vector<std::tuple<std::int64_t, int, Position, Position>> Lanes::take(
    const std::vector<Row>& said, const std::vector<bool>& is_finite) {
  std::vector<std::tuple<std::int64_t, int, Position, Position>> failed;
  Position answer = 0;
  for (const Item& item : items_) {
    Lane& lane = *item.lane;
    Track& track = lane.tracks[item.role];
    lane.books.pay(world_.prices, item.role, item.end - item.start, item.end - item.first_row + 1);
    track.num_computed = item.end;
    ++track.passes;
    bool has_failed = false;
    for (Position position = item.first_row; position <= item.end; ++position, ++answer) {
      if (is_finite[answer]) {
        track.put_row(
            {position, said[answer].token, said[answer].top_token, said[answer].top_prob});
      } else {
        has_failed = true;
        failed.emplace_back(lane.id, item.role, position, answer);
      }
    }
    if (!has_failed) register_blocks(lane, item.role, track);
  }
  return failed;
}

void Lanes::register_blocks(const Lane& lane, int role, Track& track) {
  const Pool& pool = *track.pool;
  if (!pool.prefix_caching) return;
  const Position full = std::min(track.num_computed, track.context_len) / pool.block_size;
  for (; track.registered < full; ++track.registered) {
    const Token* tokens = track.tokens.data() + (track.registered * pool.block_size - track.begin);
    int& block = track.blocks[track.registered];
    block = register_(lane.id, role, tokens, pool.block_size, block);
  }
}

bool Lanes::onward() {
  std::vector<Item> next;
  foreign_.clear();
  for (const Item& item : items_) {
    if (item.ahead == 0) continue;
    Track& track = item.lane->tracks[item.role];
    const Row* row = track.find_row(item.end);
    const bool ends = row != nullptr && item.lane->need.has_ends && track.is_end(row->token);
    if (row == nullptr || ends) continue;
    const Token token = row->token;
    item.lane->books.rewind(item.role, track.set_context(item.end, &token, 1));
    // Without a block, the rest becomes a need of its own.
    const bool has_block =
        track.pool->blocks_for(item.end + 1) <= static_cast<Position>(track.blocks.size());
    if (!has_block && (track.pool->available() == 0 || !track.grow(item.end + 1))) continue;
    next.push_back({item.lane, item.role, item.end, item.end + 1, item.end + 1, item.ahead - 1});
  }
  items_ = std::move(next);
  return !items_.empty();
}

std::pair<std::vector<std::int64_t>, std::optional<std::int64_t>> Lanes::advance_before(
    std::int64_t limit, std::vector<double> sharers) {
  world_.sharers = std::move(sharers);
  std::vector<std::int64_t> moved;
  auto next = planned_.begin();
  for (; next != planned_.end() && *next < limit; ++next) {
    try {
      advance(at(*next), world_);
      moved.push_back(*next);
    } catch (const NotOrdinary&) {
      const std::int64_t back = *next;
      planned_.erase(planned_.begin(), next + 1);
      return {std::move(moved), back};
    }
  }
  planned_.erase(planned_.begin(), next);
  return {std::move(moved), std::nullopt};
}

}  // namespace nudging
