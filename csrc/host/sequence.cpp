// One model's view of a request: the twin of sequence.py.
#include <algorithm>

#include "nudging/fast_path.h"

namespace nudging {

bool Sequence::is_end(Token token) const {
  return std::binary_search(ends.begin(), ends.end(), token);
}

const Row* Sequence::find_row(Position position) const {
  for (const Row& row : rows) {
    if (row.position == position) return &row;
  }
  return nullptr;
}

void Sequence::put_row(const Row& row) {
  for (Row& old : rows) {
    if (old.position == row.position) {
      old = row;
      return;
    }
  }
  rows.push_back(row);
}

void Sequence::forget_rows_before(Position position) {
  auto is_old = [&](const Row& row) { return row.position < position; };
  rows.erase(std::remove_if(rows.begin(), rows.end(), is_old), rows.end());
}

void Sequence::uncompute(Position length) {
  if (length >= num_computed) return;
  // What others share or find is not written again as it is: Python knows how.
  if (length / pool->block_size < std::max(own_from, registered)) throw NeedsPython{};
  num_computed = length;
}

void Sequence::truncate(Position length) {
  if (length >= this->length()) return;
  if (length < begin) throw NeedsPython{};
  uncompute(length);
  tokens.resize(length - begin);
  auto is_stale = [&](const Row& row) { return row.position > length; };
  rows.erase(std::remove_if(rows.begin(), rows.end(), is_stale), rows.end());
  const auto keep = static_cast<std::size_t>(pool->blocks_for(num_computed));
  while (blocks.size() > keep) {
    pool->release(blocks.back());
    blocks.pop_back();
  }
}

Position Sequence::set_context(Position start, const Token* ids, Position count) {
  for (Position offset = 0; offset < count; ++offset) {
    const Position position = start + offset;
    const bool is_there = position < length();
    if (is_there && token_at(position) == ids[offset]) continue;
    truncate(position);
    tokens.insert(tokens.end(), ids + offset, ids + count);
    return is_there ? position : -1;
  }
  return -1;
}

bool Sequence::grow(Position end) {
  const auto wanted = static_cast<std::size_t>(pool->blocks_for(end));
  while (blocks.size() < wanted) {
    const int block = pool->allocate();
    if (block < 0) return false;
    blocks.push_back(block);
  }
  return true;
}

}  // namespace nudging
