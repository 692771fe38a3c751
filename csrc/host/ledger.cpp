#include "nudging/ledger.h"

#include <algorithm>
#include <cmath>

namespace nudging {

namespace {

// As in adaptive.py, which says why.
constexpr double ALLOWANCE = 0.02, LOAN = 1.0, CROWD_LOAN = 2.0, GAIN = 1.05, FORGETTING = 0.05;
constexpr double MANY_ROWS = 1000;

double expected_tokens(std::int64_t length, double agreement) {
  const auto count = static_cast<double>(length + 1);
  return agreement == 1 ? count : (1 - std::pow(agreement, count)) / (1 - agreement);
}

}  // namespace

double Curve::of(double rows, double answers) const {
  const double size = rows + head_share * (answers - rows);
  if (line.empty()) return prior;
  const auto after = std::upper_bound(line.begin(), line.end(), size,
                                      [](double x, const auto& point) { return x < point.first; });
  if (after == line.begin() || line.size() == 1) return line.front().second;
  const auto right = after == line.end() ? after - 1 : after;
  const auto left = right - 1;
  const double slope = (right->second - left->second) / (right->first - left->first);
  return left->second + slope * (size - left->first);
}

double Prices::of(int model, double rows, double answers) {
  if (!known_[model]) {
    curves_[model] = find_(model);
    known_[model] = true;
  }
  return curves_[model] ? curves_[model]->of(rows, answers) : cost_(model, rows, answers);
}

double Books::price(Prices& prices, int role, std::int64_t rows, std::int64_t answers,
                    double sharers) const {
  const double count = sharers != 0 ? sharers : ledger_->roles[role].sharers;
  return prices.of(models_[role], static_cast<double>(rows) * count,
                   static_cast<double>(answers) * count) /
         count;
}

void Books::share(Prices& prices, const std::vector<double>& sharers) {
  for (std::size_t role = 0; role < models_.size(); ++role) {
    ledger_->roles[role].sharers = sharers[models_[role]];
  }
  price_anew(prices);
}

void Books::price_anew(Prices& prices) {
  if (ledger_->open == 0) return;
  const double before = ledger_->last_price;
  ledger_->last_price = price_of_last(prices);
  expect(ledger_->open * (ledger_->last_price / before - 1));
}

double Books::price_of_last(Prices& prices) const {
  return price(prices, static_cast<int>(ledger_->last_role),
               static_cast<std::int64_t>(ledger_->last_rows), 1);
}

void Books::expect(double cost) {
  ledger_->open += cost;
  ledger_->lazy += cost;
  account_->lazy += cost;
}

void Books::ask(Prices& prices, int role, std::int64_t position) {
  Ledger::Role& asked = ledger_->roles[role];
  const auto rows = position - static_cast<std::int64_t>(asked.asked);
  if (rows <= 0) return;
  asked.asked = static_cast<double>(position);
  ledger_->last_role = role;
  ledger_->last_rows = static_cast<double>(rows);
  ledger_->open = 0;
  ledger_->last_price = price_of_last(prices);
  expect(ledger_->last_price);
}

void Books::rewind(int role, std::int64_t position) {
  Ledger::Role& asked = ledger_->roles[role];
  if (position >= 0 && static_cast<double>(position) < asked.asked) {
    asked.asked = static_cast<double>(position);
  }
}

void Books::plan(double cost) {
  account_->owed += cost - ledger_->owed;
  ledger_->owed = cost;
}

void Books::pay(Prices& prices, int role, std::int64_t rows, std::int64_t answers) {
  price_anew(prices);
  const double cost = price(prices, role, rows, answers);
  if (answers == 0 && role == static_cast<int>(ledger_->last_role) &&
      static_cast<double>(rows) < ledger_->last_rows) {
    // As in adaptive.py, which says why.
    ledger_->last_rows -= static_cast<double>(rows);
    ledger_->last_price = price_of_last(prices);
    expect(cost + ledger_->last_price - ledger_->open);
  }
  ledger_->paid += cost;
  account_->paid += cost;
  plan(std::max(ledger_->owed - cost, 0.0));
  ledger_->open = std::max(ledger_->open - cost, 0.0);
}

void Books::learn(std::int64_t drafted, std::int64_t accepted) {
  const std::int64_t count = accepted + (accepted < drafted);
  for (std::int64_t i = 0; i < count; ++i) {
    const double survived = i < accepted;
    ledger_->agreement += FORGETTING * (survived - ledger_->agreement);
    account_->agreement += FORGETTING * (survived - account_->agreement);
  }
}

double Books::common_budget() const {
  return (1 + ALLOWANCE) * account_->lazy - account_->paid - account_->owed;
}

double Books::own_budget(Prices& prices) const {
  double alone = 0;
  int dearest = 0;
  for (std::size_t role = 0; role < models_.size(); ++role) {
    const double cost = prices.of(models_[role], 1, 1);
    if (cost > alone) {
      alone = cost;
      dearest = static_cast<int>(role);
    }
  }
  const double loan = LOAN * std::min(alone, CROWD_LOAN * price(prices, dearest, 1, 1));
  return (1 + ALLOWANCE) * ledger_->lazy - ledger_->paid + loan;
}

double Books::budget(Prices& prices) const {
  return std::min(common_budget() + ledger_->owed, own_budget(prices));
}

double Books::drafting_cost(Prices& prices, const Drafting& drafting, std::int64_t length,
                            double sharers) const {
  const std::int64_t made = length - drafting.free;
  if (made <= 0) return 0;
  const double first = price(prices, drafting.drafter, drafting.lag, 1, sharers);
  return first + static_cast<double>(made - 1) * price(prices, drafting.drafter, 1, 1, sharers);
}

std::int64_t Books::affordable_rows(Prices& prices, int role, std::int64_t running) const {
  const double spare =
      std::min(common_budget() / static_cast<double>(running), own_budget(prices) - ledger_->owed);
  const double rows = std::max(spare, 0.0) / price(prices, role, 1, 1);
  return static_cast<std::int64_t>(std::min(rows, MANY_ROWS));
}

std::int64_t Books::draft_length(Prices& prices, int reader, std::int64_t rows,
                                 const Drafting& drafting, std::int64_t limit) const {
  const double affordable = budget(prices);
  const double crowd = ledger_->roles[reader].sharers;
  std::int64_t best = 0;
  double best_rate = GAIN / price(prices, reader, 1, 1);
  for (std::int64_t length = 1; length <= std::min(limit, MAX_ADAPTIVE_DRAFT); ++length) {
    const double tokens = expected_tokens(length, ledger_->agreement);
    const double read = price(prices, reader, 1 + length, 1 + length);
    if (tokens <= best_rate * read) continue;
    const double spent =
        drafting_cost(prices, drafting, length) + price(prices, reader, rows + length, 1 + length);
    if (spent > affordable) break;
    const double rate = tokens / (drafting_cost(prices, drafting, length, crowd) + read);
    if (rate > best_rate) {
      best = length;
      best_rate = rate;
    }
  }
  return best;
}

}  // namespace nudging
