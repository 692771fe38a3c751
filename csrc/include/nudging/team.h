// Threads that work through a sequence of ops together.
//
// A program is a function that every thread runs from end to end; in it, `Worker::share` deals the
// parts of an op out to whoever is free, and no part of an op begins before all parts of the ops
// before it are done.  So nobody waits for a thread, only for work that was begun: a helper that
// wakes late, or that the system has taken off its core, costs nothing but the help it would have
// been.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace nudging {

// How an op can be parted, and its work in multiply-adds or the like.
struct Span {
  std::int64_t parts, steps;
};

// Parts of an op are numbered on from those of the op before.
struct Tickets {
  alignas(64) std::atomic<std::int64_t> next{0};
  alignas(64) std::atomic<std::int64_t> done{0};
};

// One thread's place in the program.
class Worker {
 public:
  // Alone, without tickets: all of every op at once.
  Worker() = default;
  Worker(Tickets& tickets, int threads) : tickets_(&tickets), threads_(threads) {}

  // part(begin, end) over [0, span.parts), in pieces.  Every thread has to call it with the same.
  template <class Part>
  void share(const Span& span, const Part& part) {
    if (tickets_ == nullptr) {
      if (span.parts > 0) part(std::int64_t{0}, span.parts);
      return;
    }
    const std::int64_t pieces = pieces_of(span), end = begin_ + pieces;
    wait_for_all_before();
    for (std::int64_t ticket = take(end); ticket < end; ticket = take(end)) {
      const std::int64_t piece = ticket - begin_;
      part(span.parts * piece / pieces, span.parts * (piece + 1) / pieces);
      tickets_->done.fetch_add(1, std::memory_order_acq_rel);
    }
    begin_ = end;
  }

  // Returns when every part of the ops so far is done.
  void wait_for_all_before() const;

 private:
  std::int64_t pieces_of(const Span& span) const;
  std::int64_t take(std::int64_t end);

  Tickets* tickets_ = nullptr;
  int threads_ = 1;
  std::int64_t begin_ = 0;
};

// The calling thread and threads - 1 helpers, which sleep while there is nothing to do.
class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Run the program, whose largest op is `largest`, to its end: program(worker) on the caller, and
  // on the helpers where the op is large enough to be parted.  It must not throw.
  template <class Program>
  void run(const Span& largest, const Program& program) {
    if (!pays(largest)) {
      Worker alone;
      program(alone);
      return;
    }
    run([](const void* it, Worker& worker) { (*static_cast<const Program*>(it))(worker); },
        &program);
  }

 private:
  using Call = void (*)(const void* program, Worker& worker);

  // Where helpers sleep.
  struct Bed {
    std::mutex mutex;
    std::condition_variable wake;
  };

  bool pays(const Span& largest) const;
  void run(Call call, const void* program);
  void help();
  bool await_round(std::uint64_t seen);

  std::vector<std::thread> helpers_;
  int process_;      // the one that has the helpers: a fork of it does not
  std::mutex turn_;  // one program at a time
  Tickets tickets_;
  Call call_ = nullptr;
  const void* program_ = nullptr;
  std::atomic<int> door_{0};  // how many helpers are inside, plus kOpen while they may enter
  std::atomic<std::uint64_t> round_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> ended_{false};
  std::unique_ptr<Bed> bed_;
};

}  // namespace nudging
