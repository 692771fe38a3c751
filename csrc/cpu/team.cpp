#include "nudging/team.h"

#include <signal.h>
#include <unistd.h>

#include "check.h"

namespace nudging {
namespace {

// A piece of less work is not worth taking: this is a microsecond or two.
constexpr std::int64_t kStepsPerPiece = std::int64_t{1} << 16;

// Below this many steps in an op, waking helpers costs more than they bring.
constexpr std::int64_t kStepsForHelp = std::int64_t{1} << 19;

// So many pieces for each thread: a thread that is held up leaves the others little to wait for.
constexpr std::int64_t kPiecesPerThread = 8;

// Turns of a loop that waits: so many of some 20 ns each, and then of a system call that lets run
// whoever else waits for this core, which may be the one that is waited for.
constexpr int kTurnsAwake = 100;

// A helper that has waited so many turns after a program sleeps.
constexpr int kTurnsBetween = 300;

constexpr int kOpen = 1 << 30;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_a_turn(int turn) {
  if (turn < kTurnsAwake) {
    pause();
  } else {
    std::this_thread::yield();
  }
}

}  // namespace

std::int64_t Worker::pieces_of(const Span& span) const {
  std::int64_t pieces = span.steps / kStepsPerPiece;
  const std::int64_t most = threads_ * kPiecesPerThread;
  if (pieces > most) pieces = most;
  if (pieces > span.parts) pieces = span.parts;
  return pieces > 1 ? pieces : span.parts > 0 ? 1 : 0;
}

void Worker::wait_for_all_before() const {
  if (tickets_ == nullptr) return;
  for (int turn = 0; tickets_->done.load(std::memory_order_acquire) < begin_; ++turn) {
    wait_a_turn(turn);
  }
}

// A piece is taken when it can begin and not before: a thread that waits must not be waited for.
std::int64_t Worker::take(std::int64_t end) {
  std::int64_t ticket = tickets_->next.load(std::memory_order_relaxed);
  while (ticket < end &&
         !tickets_->next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_relaxed)) {
  }
  return ticket;
}

Team::Team(int threads) : process_(::getpid()), bed_(std::make_unique<Bed>()) {
  if (threads < 1 || threads > 1024)
    cpu::refuse("threads is ", threads, ", it must be from 1 to 1024");
  // Signals are for the threads that know of them.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int i = 1; i < threads; ++i) helpers_.emplace_back([this] { help(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Team::~Team() {
  if (process_ != ::getpid()) {
    // A fork's bed still counts those who slept in it, or is locked by them: its end would wait for
    // them.
    static_cast<void>(bed_.release());
    for (std::thread& helper : helpers_) helper.detach();
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(bed_->mutex);
    ended_ = true;
  }
  bed_->wake.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

bool Team::pays(const Span& largest) const {
  return !helpers_.empty() && largest.parts > 1 && largest.steps >= kStepsForHelp;
}

void Team::run(Call call, const void* program) {
  const std::lock_guard<std::mutex> lock(turn_);
  tickets_.next.store(0, std::memory_order_relaxed);
  tickets_.done.store(0, std::memory_order_relaxed);
  call_ = call;
  program_ = program;
  door_.store(kOpen);
  round_.fetch_add(1);
  if (sleepers_.load() > 0) {
    {
      const std::lock_guard<std::mutex> asleep(bed_->mutex);
    }
    bed_->wake.notify_all();
  }
  Worker worker(tickets_, threads());
  call(program, worker);
  worker.wait_for_all_before();
  // Who is still inside has nothing left to do but to notice it.
  door_.fetch_sub(kOpen);
  for (int turn = 0; door_.load() != 0; ++turn) wait_a_turn(turn);
}

// False when the team has ended.
bool Team::await_round(std::uint64_t seen) {
  for (int turn = 0; turn < kTurnsBetween; ++turn) {
    if (ended_.load(std::memory_order_relaxed)) return false;
    if (round_.load() != seen) return true;
    wait_a_turn(turn);
  }
  std::unique_lock<std::mutex> lock(bed_->mutex);
  sleepers_.fetch_add(1);
  bed_->wake.wait(lock, [&] { return ended_.load() || round_.load() != seen; });
  sleepers_.fetch_sub(1);
  return !ended_.load();
}

void Team::help() {
  std::uint64_t seen = 0;
  while (await_round(seen)) {
    seen = round_.load();
    int inside = door_.load();
    while ((inside & kOpen) != 0 && !door_.compare_exchange_weak(inside, inside + 1)) {
    }
    if ((inside & kOpen) == 0) continue;
    Worker worker(tickets_, threads());
    call_(program_, worker);
    door_.fetch_sub(1);
  }
}

}  // namespace nudging
