// The host half of ordinary steps: requests in the midst of their text, by policies that need
// nothing of Python.
//
// The twin of what sequence.py, policy_view.py, drafting.py, scheduler.py, batch.py and engine.py
// do for them.  What is not ordinary (an end, a lack of blocks, a prompt to read) is not done here:
// the carried request is handed back as it was before the step, and Python does that step.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "nudging/ledger.h"

namespace nudging {

using Token = std::int32_t;
using Position = std::int64_t;

// A need of more tokens than this is a prompt to read, not a text to write.
constexpr Position DECODE_TOKENS = 32;

// Thrown where a step is not ordinary.
struct NeedsPython {};

// What a model says after `position` tokens.
struct Row {
  Position position;
  Token token;
  Token top_token;
  double top_prob;
};

// The blocks of one model's cache.
struct Pool {
  std::function<int()> allocate;  // a block, or -1 where none is to be had
  std::function<void(int)> release;
  std::function<Position()> available;
  Position block_size;
  bool prefix_caching;

  Position blocks_for(Position tokens) const { return (tokens + block_size - 1) / block_size; }
};

// One model's view of a request; see Sequence.  Of the tokens, those from `begin` on are here.
struct Sequence {
  int model = 0;
  Pool* pool = nullptr;
  Position prompt_len = 0, max_len = 0, max_sequence = 0;
  std::vector<Token> ends;  // sorted
  Position begin = 0;
  std::vector<Token> tokens;
  Position num_computed = 0, context_len = 0;
  std::vector<Row> rows;
  std::vector<int> blocks;
  Position registered = 0;  // so many of its first blocks can be found by others
  Position own_from = 0;    // from this block on, all are its own and nobody can find them
  std::int64_t passes = 0;

  Position length() const { return begin + static_cast<Position>(tokens.size()); }
  Token token_at(Position position) const { return tokens[position - begin]; }
  bool is_end(Token token) const;
  const Row* find_row(Position position) const;
  void put_row(const Row& row);
  void forget_rows_before(Position position);
  void truncate(Position length);
  // The position of the first token that had to be replaced, -1 where none had to.
  Position set_context(Position start, const Token* ids, Position count);
  void uncompute(Position length);
  // Own blocks for the first `end` tokens; false where one is not to be had.
  bool grow(Position end);
};

enum class Writer { solo, token, word };

struct Rule {
  Writer writer;
  double threshold;
  bool or_equal;
  Position lookahead;

  bool unsure(double top_prob) const {
    return top_prob < threshold || (or_equal && top_prob == threshold);
  }
};

struct Need {
  int role;
  Position first, last, ahead;
  bool has_ends;
};

struct Draft {
  bool exists = false;
  Position start = 0, length = 0;
  std::vector<Token> tokens;
};

// One request's roles: role 0 writes, or is the base; role 1 is the guide.
constexpr int BASE = 0, GUIDE = 1;

// One request.
struct Carried {
  std::int64_t id = 0;
  Rule rule{};
  std::vector<Sequence> sequences;
  Position output_begin = 0;  // of the output, what stands from here on is here
  std::vector<Token> output;
  std::vector<std::uint8_t> authors;  // of the last tokens: those that nobody has read yet
  Position max_tokens = 0, draft_len = 0;
  Token vocab = 0;
  std::vector<Token> stop_tokens;  // sorted
  std::vector<std::string> stops;  // stop strings, in UTF-8
  std::string tail;                // the bytes at the text's end that may begin one
  bool drafts = false;
  bool is_greedy = true;
  Need need{};
  Draft draft;
  Books books;
  std::int64_t drafted = 0, accepted = 0;
  std::map<std::int64_t, std::int64_t> cycles;

  Position ahead() const {
    return rule.lookahead + (draft_len < 0 ? MAX_ADAPTIVE_DRAFT : draft_len);
  }
  Position written() const { return output_begin + static_cast<Position>(output.size()); }
};

// What a token adds to a carried request's text.
using TokenBytes = std::function<std::string(std::int64_t carried, Token)>;

// What steps of all carried requests have in common.
struct World {
  TokenBytes token_bytes;
  Prices prices;
  std::vector<double> sharers;  // how many requests share the passes of each model
};

// Run the carried request's policy until it misses a row, which is the need then.  Throws
// NeedsPython before a step that is not.
void advance(Carried& carried, World& world);

// tokens[start:end] of one sequence are to be computed, the rows from first_row to end to be
// answered.
struct Item {
  Carried* carried;
  int role;
  Position start, end, first_row, ahead;
};

// The same of a request that Python carries.
struct Foreign {
  std::vector<Token> tokens;  // from start to end
  Position start, end, first_row, ahead;
  std::vector<int> blocks;
};

struct BatchSizes {
  Position rows, seqs, width, answers;
};

// How many tokens are planned, how many blocks they and the paths behind them lack, and the
// carried requests whose step is not ordinary.
struct Plan {
  Position tokens = 0, missing = 0;
  std::vector<std::int64_t> not_ordinary;
};

// Blocks of each model that the carried requests do not hold and will need soon, and the (carried,
// role) that hold none yet, of whose first blocks others may hold some.
struct CarriedClaims {
  std::vector<Position> blocks;
  std::vector<std::pair<std::int64_t, int>> without_blocks;
};

// Puts a full block of a carried request's role where others find it; returns the block that holds
// it then.
using Register = std::function<int(std::int64_t carried, int role, const Token* tokens,
                                   Position count, int block)>;

class FastPath {
 public:
  FastPath(std::vector<Pool> pools, Register register_block, TokenBytes token_bytes, PassCost cost,
           FindCurve find);

  Pool* pool(int model) { return &pools_[model]; }
  Carried& enter(std::unique_ptr<Carried> carried);
  Carried& at(std::int64_t id);
  std::unique_ptr<Carried> leave(std::int64_t id);
  std::size_t size() const { return fast_path_.size(); }

  // What the carried requests need of a model now.  Those that are not ordinary must leave before
  // `own`.
  Plan plan(int model);
  // Own the blocks of what is planned; returns the carried requests that cannot, which are planned
  // no more.
  std::vector<std::int64_t> own();
  // What all carried requests claim together; see Claims in claims.py.
  CarriedClaims claims(Position headroom_blocks) const;
  // How many tokens of paths each planned request still wants, with its next one.
  std::vector<Position> path_lengths() const;
  // How many carried requests need the model and nothing else before.
  Position ready(int model) const;
  // At most `steps` tokens of every path; while others write theirs, a word's guide writes on as
  // far as it can afford, were all of so many requests that run to do so.
  void cap_paths(Position steps, Position running);

  void add_foreign(Foreign foreign) { foreign_.push_back(std::move(foreign)); }
  BatchSizes sizes(Position block_size) const;
  void fill(std::uint8_t* memory, const BatchSizes& shape, Position block_size,
            Position spare_slot) const;
  const std::vector<Item>& items() const { return items_; }
  // How many rows the items have to compute, and how many are to be answered.
  Position tokens() const;
  Position answers() const;

  // File the answers of a pass; returns the (carried, role, position, answer) of rows that are not
  // finite, which are not filed.
  std::vector<std::tuple<std::int64_t, int, Position, Position>> take(
      const std::vector<Row>& said, const std::vector<bool>& is_finite);
  // The next token of every path; false where none goes on.
  bool onward();
  // Let the policies of what was planned run on, in the order of their ids, up to the first one
  // whose step is not ordinary or whose id is `limit` or more.  Returns the carried requests that
  // moved and the one that must leave.  Who calls again goes on behind it.
  std::pair<std::vector<std::int64_t>, std::optional<std::int64_t>> advance_before(
      std::int64_t limit, std::vector<double> sharers);
  // What passes of the model cost has been learned anew.
  void forget_prices(int model) { world_.prices.forget(model); }

 private:
  void register_blocks(const Carried& carried, int role, Sequence& sequence);
  Position path_ahead(const Item& item, Position steps, Position running);

  std::vector<Pool> pools_;
  Register register_;
  World world_;
  std::map<std::int64_t, std::unique_ptr<Carried>> fast_path_;
  std::vector<std::int64_t> planned_;
  std::vector<Item> items_;
  std::vector<Foreign> foreign_;
};

}  // namespace nudging
