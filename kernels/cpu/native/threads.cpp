#include "threads.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace tokenmill {
namespace {

constexpr int kThreadsMax = 64;
constexpr int64_t kPiecesPerThread = 16;  // a share's last piece, which nobody can help with, is a sixteenth of it
// How often a thread looks for the next region before it sleeps, 15 to 50 ns apart: a millisecond or more, for waking it takes
// 50 us and more, and between two steps there are some hundred.
constexpr int kLooksForWork = 60000;
// How often it looks for the end of a piece that another has begun before it offers its core: that other may need it.
// (Not earlier: whoever yields on a busy machine is away for milliseconds.)
constexpr int kLooksForEnd = 15000;

// The pieces of one thread's share that nobody has taken, with the region's number: whoever comes from an earlier
// region finds another number and takes nothing.
struct alignas(64) Share {
  std::atomic<uint64_t> left{0};  // region << 32 | pieces
  int64_t begin, end;
};

class Pool {
 public:
  bool run(int64_t size, int64_t grain, int num_threads, Piece piece, const void* context) {
    std::unique_lock<std::mutex> only(one_at_a_time_, std::try_to_lock);
    if (!only) return false;
    start(num_threads - 1);
    divide(size, grain, num_threads);
    piece_ = piece, context_ = context, failure_ = nullptr;
    const uint32_t region = region_.load(std::memory_order_relaxed) + 1;
    for (int i = 0; i < num_shares_; i++) {
      shares_[i].left.store(uint64_t(region) << 32 | num_pieces(shares_[i]), std::memory_order_release);
    }
    region_.store(region, std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(sleeping_);
      wake_.notify_all();
    }
    work(0, region);
    for (int look = 0; num_left_.load(std::memory_order_acquire); look++) {
      look < kLooksForEnd ? _mm_pause() : void(sched_yield());
    }
    if (failure_) std::rethrow_exception(failure_);
    return true;
  }

 private:
  static uint32_t num_pieces_of(int64_t size, int64_t piece) { return uint32_t((size + piece - 1) / piece); }
  uint32_t num_pieces(const Share& share) const { return num_pieces_of(share.end - share.begin, piece_size_); }

  void divide(int64_t size, int64_t grain, int num_threads) {
    piece_size_ = std::max(grain, size / (kPiecesPerThread * num_threads));
    num_shares_ = int(std::min<int64_t>(num_threads, num_pieces_of(size, piece_size_)));
    uint32_t all = 0;
    for (int i = 0; i < num_shares_; i++) {
      shares_[i].begin = size * i / num_shares_, shares_[i].end = size * (i + 1) / num_shares_;
      all += num_pieces(shares_[i]);
    }
    num_left_.store(all, std::memory_order_relaxed);
  }

  // All pieces that can be had, of the own share first.
  void work(int self, uint32_t region) {
    // The number of shares may be a later region's by now, and then there is nothing to be had.
    for (int i = 0, n = num_shares_; i < n; i++) {
      Share& share = shares_[(self + i) % n];
      uint64_t left = share.left.load(std::memory_order_acquire);
      while (left >> 32 == region && uint32_t(left)) {
        if (!share.left.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
        // The region lasts until this piece is done, so that all of it may be read from here on.
        const int64_t begin = share.begin + int64_t(num_pieces(share) - uint32_t(left)) * piece_size_;
        try {
          piece_(context_, begin, std::min(begin + piece_size_, share.end));
        } catch (...) {
          std::lock_guard<std::mutex> lock(sleeping_);
          if (!failure_) failure_ = std::current_exception();
        }
        num_left_.fetch_sub(1, std::memory_order_acq_rel);
        left = share.left.load(std::memory_order_acquire);
      }
    }
  }

  void start(int num_others) {
    for (; num_started_ < num_others; num_started_++) {
      std::thread([this, self = num_started_ + 1, region = region_.load()] { serve(self, region); }).detach();
    }
  }

  void serve(int self, uint32_t region) {
    for (;;) {
      region = next(region);
      work(self, region);
    }
  }

  // The number of the next region that has begun.
  uint32_t next(uint32_t region) {
    for (int look = 0; look < kLooksForWork; look++, _mm_pause()) {
      const uint32_t now = region_.load(std::memory_order_acquire);
      if (now != region) return now;
    }
    std::unique_lock<std::mutex> lock(sleeping_);
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return region_.load(std::memory_order_seq_cst) != region; });
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    return region_.load(std::memory_order_acquire);
  }

  Share shares_[kThreadsMax];
  std::atomic<int> num_shares_{0};
  std::atomic<int64_t> piece_size_{1};
  std::atomic<Piece> piece_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<uint32_t> num_left_{0};
  alignas(64) std::atomic<uint32_t> region_{0};
  std::atomic<int> num_sleeping_{0}, num_started_{0};
  std::mutex one_at_a_time_, sleeping_;
  std::condition_variable wake_;
  std::exception_ptr failure_;
};

// Never destroyed: its threads run until the process ends.
Pool& pool() {
  static Pool* only = new Pool;
  return *only;
}

}  // namespace

void run_parallel(int64_t size, int64_t grain, int num_threads, Piece piece, const void* context) {
  if (size <= 0) return;
  const bool is_small = num_threads <= 1 || size <= grain;
  if (is_small || !pool().run(size, grain, std::min(num_threads, kThreadsMax), piece, context)) piece(context, 0, size);
}

}  // namespace tokenmill
