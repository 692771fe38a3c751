// The ragged batch of one model's pass, written where the device reads it: the twin of batch.py.
#include <algorithm>

#include "nudging/fast_path.h"

namespace nudging {

namespace {

// Unused entries of a block table hold an id that no pool has: reading one fails instead of going
// unnoticed.
constexpr std::int32_t IMPOSSIBLE_BLOCK = 2'147'480'000;
// Block tables are this much wider than they have to be at most, so that texts that grow keep their
// shape.
constexpr Position WIDTH_STEP = 8;

// One sequence of the batch.
struct Span {
  const Token* tokens;  // from start on
  const std::vector<int>& blocks;
  Position start, end, first_row, ahead;
};

struct Cursor {
  std::int64_t *ids, *positions, *slots, *answers;
  std::int32_t *starts, *lengths, *tables;
  Position block_size, width;
  Position row = 0, seq = 0, answer = 0;

  void write(const Span& span) {
    for (Position p = span.first_row; p <= span.end; ++p) {
      // The row after tokens[:p] is computed where token p - 1 is fed.
      answers[answer++] = row + p - 1 - span.start;
    }
    for (Position p = span.start; p < span.end; ++p, ++row) {
      ids[row] = span.tokens[p - span.start];
      positions[row] = p;
      slots[row] =
          static_cast<std::int64_t>(span.blocks[p / block_size]) * block_size + p % block_size;
    }
    const auto held = std::min(static_cast<Position>(span.blocks.size()), width);
    std::int32_t* table = tables + seq * width;
    std::copy_n(span.blocks.begin(), held, table);
    std::fill(table + held, table + width, IMPOSSIBLE_BLOCK);
    lengths[seq++] = static_cast<std::int32_t>(span.end);
    starts[seq] = static_cast<std::int32_t>(row);
  }

  // Rows that pad the batch are a sequence of their own, in the block that is no pool's.
  void pad(const BatchSizes& shape, Position spare_slot) {
    const Position rows = row;
    for (; row < shape.rows; ++row) {
      ids[row] = positions[row] = 0;
      slots[row] = spare_slot;
    }
    std::fill(answers + answer, answers + shape.answers, 0);
    std::fill(starts + seq + 1, starts + shape.seqs + 1, static_cast<std::int32_t>(rows));
    std::fill(lengths + seq, lengths + shape.seqs, 0);
    std::fill(tables + seq * width, tables + shape.seqs * width, IMPOSSIBLE_BLOCK);
    if (rows == shape.rows) return;
    starts[shape.seqs] = static_cast<std::int32_t>(shape.rows);
    lengths[shape.seqs - 1] = static_cast<std::int32_t>(shape.rows - rows);
    std::fill(tables + (shape.seqs - 1) * width, tables + shape.seqs * width,
              static_cast<std::int32_t>(spare_slot / block_size));
  }
};

template <class F>
void for_each_span(const std::vector<Item>& items, const std::vector<Foreign>& foreign, F&& visit) {
  for (const Item& item : items) {
    const Sequence& sequence = item.carried->sequences[item.role];
    visit(Span{sequence.tokens.data() + (item.start - sequence.begin), sequence.blocks, item.start,
               item.end, item.first_row, item.ahead});
  }
  for (const Foreign& other : foreign) {
    visit(Span{other.tokens.data(), other.blocks, other.start, other.end, other.first_row,
               other.ahead});
  }
}

}  // namespace

BatchSizes FastPath::sizes(Position block_size) const {
  BatchSizes sizes{0, 0, 0, 0};
  for_each_span(items_, foreign_, [&](const Span& span) {
    sizes.rows += span.end - span.start;
    sizes.seqs += 1;
    sizes.width = std::max(sizes.width, (span.end + span.ahead + block_size - 1) / block_size);
    sizes.answers += std::max<Position>(span.end - span.first_row + 1, 0);
  });
  sizes.width = (sizes.width + WIDTH_STEP - 1) / WIDTH_STEP * WIDTH_STEP;
  return sizes;
}

void FastPath::fill(std::uint8_t* memory, const BatchSizes& shape, Position block_size,
                    Position spare_slot) const {
  auto* longs = reinterpret_cast<std::int64_t*>(memory);
  auto* ints = reinterpret_cast<std::int32_t*>(longs + 3 * shape.rows + shape.answers);
  Cursor cursor{
      longs,      longs + shape.rows,    longs + 2 * shape.rows,    longs + 3 * shape.rows,
      ints,       ints + shape.seqs + 1, ints + 2 * shape.seqs + 1, block_size,
      shape.width};
  cursor.starts[0] = 0;
  for_each_span(items_, foreign_, [&](const Span& span) { cursor.write(span); });
  cursor.pad(shape, spare_slot);
}

}  // namespace nudging
