// What a request's drafts cost and may cost: the twin of adaptive.py, on the same numbers.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

namespace nudging {

// The longest draft that is made because it pays.
constexpr std::int64_t MAX_ADAPTIVE_DRAFT = 15;

// The expected price of a pass of one model of so many rows, so many of which are answered.
using PassCost = std::function<double(int model, double rows, double answers)>;

// All that a price of nudging.costs.PassCosts is made of.
struct Curve {
  double head_share, prior;
  std::vector<std::pair<double, double>> line;  // rows and seconds, by rows

  double of(double rows, double answers) const;
};

// The curve of a model, if its costs are one.
using FindCurve = std::function<std::optional<Curve>(int model)>;

// Prices of passes: of curves, asked for once until they are learned anew, else each by itself.
class Prices {
 public:
  Prices(PassCost cost, FindCurve find, std::size_t models)
      : cost_(std::move(cost)), find_(std::move(find)), curves_(models), known_(models, false) {}

  double of(int model, double rows, double answers);
  void forget(int model) { known_[model] = false; }

 private:
  PassCost cost_;
  FindCurve find_;
  std::vector<std::optional<Curve>> curves_;
  std::vector<bool> known_;
};

// The numbers of nudging.adaptive.Account.
struct Account {
  double lazy, paid, owed, agreement;
};

// The numbers of nudging.adaptive.Ledger; of `roles`, those are there that the policy has.
struct Ledger {
  struct Role {
    double asked, sharers;
  };
  double lazy, paid, agreement, owed, open, last_role, last_rows, last_price;
  Role roles[2];
};

// What a draft takes: see nudging.adaptive.Drafting.
struct Drafting {
  int drafter;
  std::int64_t free, lag;
};

class Books {
 public:
  Books() = default;
  Books(Ledger* ledger, Account* account, std::vector<int> models)
      : ledger_(ledger), account_(account), models_(std::move(models)) {}

  void ask(Prices& prices, int role, std::int64_t position);
  void rewind(int role, std::int64_t position);
  // `sharers`: of each model's passes.
  void share(Prices& prices, const std::vector<double>& sharers);
  void plan(double cost);
  void pay(Prices& prices, int role, std::int64_t rows, std::int64_t answers);
  void learn(std::int64_t drafted, std::int64_t accepted);
  // `sharers` 0: those that share the role's passes now.
  double price(Prices& prices, int role, std::int64_t rows, std::int64_t answers,
               double sharers = 0) const;
  double drafting_cost(Prices& prices, const Drafting& drafting, std::int64_t length,
                       double sharers = 0) const;
  std::int64_t affordable_rows(Prices& prices, int role, std::int64_t running) const;
  std::int64_t draft_length(Prices& prices, int reader, std::int64_t rows, const Drafting& drafting,
                            std::int64_t limit) const;

 private:
  double price_of_last(Prices& prices) const;
  void price_anew(Prices& prices);
  void expect(double cost);
  double budget(Prices& prices) const;
  double common_budget() const;
  double own_budget(Prices& prices) const;

  Ledger* ledger_ = nullptr;
  Account* account_ = nullptr;
  std::vector<int> models_;  // of each role
};

}  // namespace nudging
