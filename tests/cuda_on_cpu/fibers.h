// How cuda_runtime.h, which includes this, runs a grid on the CPU.
//
// Each thread of a block is a fiber. It runs until it waits, for its block (__syncthreads) or for its warp (shuffles);
// all others of its warp then do. A warp runs as far as it can before the next one begins: so a thread that reads what
// another has yet to write finds NaN, one that writes what another has yet to read spoils it, and a barrier that not all
// reach is an error. Blocks run one after the other, those of a cluster by turns: each as far as it can before the next
// one. REVERSED turns round the order of blocks and of warps, and lets no thread of a cluster go on from where it
// arrived before all have.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;
constexpr size_t kShared = 48 << 10, kMaxShared = 227 << 10;  // what a kernel gets, and what it can ask for on a Hopper
constexpr unsigned kMaxCluster = 8;

enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kWaitsForCluster, kWaitsForMail, kEnded };

inline unsigned volume(dim3 d) { return d.x * d.y * d.z; }

// Of 16 bytes, begun by a thread and not yet there; zeros if it is from nowhere.
struct Copy {
  char* to;
  const void* from;
  unsigned group;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kRuns;
  // What the thread shows its warp, in turns: the next must not overwrite what a slower lane has yet to read.
  alignas(8) char shown[2][24];
  unsigned turns = 0;
  std::vector<Copy> copies;
  unsigned groups = 0;    // of copies, that were made
  unsigned arrivals = 0;  // at the barrier of its cluster
};

// What a block was sent and has not received.
struct Letter {
  float2* to;
  float2 what;
};

// A block, or those of a cluster: the threads of one after those of the other.
struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  ucontext_t scheduler;
  unsigned current = 0, blocks = 1;
  std::vector<Letter> letters[kMaxCluster];
  bool received[kMaxCluster], reversed = false;
  alignas(128) char all_shared[kMaxCluster][kMaxShared];  // dynamic

  unsigned rank() const { return current / blockDim.x; }
  char* shared() { return all_shared[rank()]; }
};

inline Block block;

inline void wait(State state) {
  Fiber& self = block.fibers[block.current];
  self.state = state;
  swapcontext(&self.context, &block.scheduler);
}

inline void run_fiber() {
  block.kernel();
  block.fibers[block.current].state = State::kEnded;
}

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", why);
  std::abort();
}

// Lets the threads in [begin, end) go on if all of them that have not ended wait for the same thing.
inline bool release(unsigned begin, unsigned end, State state) {
  bool waiting = false;
  for (unsigned i = begin; i < end; ++i) {
    if (const State s = block.fibers[i].state; s != state && s != State::kEnded) {
      return false;
    } else {
      waiting |= s == state;
    }
  }
  for (unsigned i = begin; waiting && i < end; ++i) {
    if (block.fibers[i].state == state) {
      block.fibers[i].state = State::kRuns;
    }
  }
  return waiting;
}

// Lets each thread in [begin, end) go on that waits for this.
inline bool release_each(unsigned begin, unsigned end, State state) {
  bool waited = false;
  for (unsigned i = begin; i < end; ++i) {
    if (block.fibers[i].state == state) {
      block.fibers[i].state = State::kRuns;
      waited = true;
    }
  }
  return waited;
}

// How often all of a cluster's threads that have not ended arrived at its barrier.
inline unsigned arrivals_of_all(unsigned threads) {
  unsigned arrivals = ~0u;
  for (unsigned i = 0; i < threads; ++i) {
    if (const Fiber& f = block.fibers[i]; f.state != State::kEnded && f.arrivals < arrivals) {
      arrivals = f.arrivals;
    }
  }
  return arrivals;
}

// Lets those go on that wait for a barrier at which all arrived.
inline bool release_cluster(unsigned threads) {
  const unsigned arrivals = arrivals_of_all(threads);
  bool released = false;
  for (unsigned i = 0; i < threads; ++i) {
    if (Fiber& f = block.fibers[i]; f.state == State::kWaitsForCluster && f.arrivals <= arrivals) {
      f.state = State::kRuns;
      released = true;
    }
  }
  return released;
}

// Runs a block of the cluster until all its threads wait or have ended.
inline void run_block(unsigned rank, unsigned threads, bool reversed) {
  const unsigned warps = (threads + warpSize - 1) / warpSize, first = rank * threads;
  do {
    for (unsigned n = 0; n < warps; ++n) {
      const unsigned begin = first + (reversed ? warps - 1 - n : n) * warpSize;
      const unsigned end = begin + warpSize < first + threads ? begin + warpSize : first + threads;
      do {
        for (unsigned i = begin; i < end; ++i) {
          if (block.fibers[i].state == State::kRuns) {
            block.current = i;
            threadIdx = dim3(i - first);
            swapcontext(&block.scheduler, &block.fibers[i].context);
          }
        }
      } while (release(begin, end, State::kWaitsForWarp));
    }
  } while (release(first, first + threads, State::kWaitsForBlock) ||
           (block.received[rank] && release_each(first, first + threads, State::kWaitsForMail)));
}

// Runs the cluster that begins at block `b` of the grid. What a block shares is NaN before it starts and when it has
// ended.
inline void run_cluster(dim3 b, dim3 cluster, unsigned threads, size_t shared_bytes, bool reversed) {
  const unsigned blocks = block.blocks, all = blocks * threads;
  for (unsigned i = 0; i < all; ++i) {
    Fiber& f = block.fibers[i];
    f.state = State::kRuns;
    f.turns = f.groups = f.arrivals = 0;
    f.copies.clear();
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, kStack};
    f.context.uc_link = &block.scheduler;
    makecontext(&f.context, run_fiber, 0);
  }
  for (unsigned rank = 0; rank < blocks; ++rank) {
    std::memset(block.all_shared[rank], 0xff, shared_bytes);
    block.letters[rank].clear();
    block.received[rank] = false;
  }
  bool going = true;
  while (going) {
    going = false;
    for (unsigned n = 0; n < blocks; ++n) {
      const unsigned rank = reversed ? blocks - 1 - n : n;
      blockIdx = dim3(b.x + rank % cluster.x, b.y + rank / cluster.x % cluster.y, b.z + rank / cluster.x / cluster.y);
      run_block(rank, threads, reversed);
      const Fiber* first = &block.fibers[rank * threads];
      if (std::all_of(first, first + threads, [](const Fiber& f) { return f.state == State::kEnded; })) {
        std::memset(block.all_shared[rank], 0xff, shared_bytes);
      }
    }
    for (unsigned rank = 0; rank < blocks; ++rank) {  // whose mail came after it had its turn
      going |= block.received[rank] && release_each(rank * threads, (rank + 1) * threads, State::kWaitsForMail);
    }
    going |= release_cluster(all);
  }
  for (unsigned i = 0; i < all; ++i) {
    if (block.fibers[i].state != State::kEnded) {
      fail("threads wait for each other at different places");
    }
  }
}

inline std::map<const void*, size_t> asked;  // shared memory, by kernel

inline void run_grid(dim3 grid, dim3 cluster, unsigned threads, size_t shared_bytes, size_t most,
                     std::function<void()> kernel) {
  const unsigned blocks = volume(cluster);
  if (threads == 0 || threads > 1024 || shared_bytes > most || most > kMaxShared || volume(grid) == 0 ||
      grid.y > 65535 || grid.z > 65535 || blocks == 0 || blocks > kMaxCluster || grid.x % cluster.x != 0 ||
      grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    fail("a launch that CUDA would refuse");
  }
  if (block.fibers.size() < blocks * threads) {
    block.fibers = std::vector<Fiber>(blocks * threads);
  }
  block.kernel = std::move(kernel);
  block.blocks = blocks;
  blockDim = dim3(threads);
  gridDim = grid;
  const bool reversed = block.reversed = std::getenv("CUDA_ON_CPU_REVERSED") != nullptr;
  const dim3 clusters(grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z);
  for (unsigned n = 0; n < volume(clusters); ++n) {
    const unsigned i = reversed ? volume(clusters) - 1 - n : n;
    const dim3 b(i % clusters.x * cluster.x, i / clusters.x % clusters.y * cluster.y,
                 i / clusters.x / clusters.y * cluster.z);
    run_cluster(b, cluster, threads, shared_bytes, reversed);
  }
}

// Shows the warp a value, and waits until each lane has shown its own. Returns which turn that was.
template <class T>
unsigned show(const T& value) {
  static_assert(sizeof(T) <= sizeof(Fiber::shown[0]));
  Fiber& self = block.fibers[block.current];
  const unsigned turn = self.turns++ % 2;
  std::memcpy(self.shown[turn], &value, sizeof value);
  wait(State::kWaitsForWarp);
  return turn;
}

// What a lane of this thread's warp showed in that turn.
template <class T>
T shown_by(unsigned lane, unsigned turn) {
  T value;
  std::memcpy(&value, block.fibers[block.current - threadIdx.x % warpSize + lane].shown[turn], sizeof value);
  return value;
}

// What lane `from` of this thread's warp shows; the thread's own value if there is no such lane.
template <class T>
T shuffle(T value, unsigned from) {
  const unsigned turn = show(value);
  const bool there = from < warpSize && threadIdx.x / warpSize * warpSize + from < blockDim.x;
  return there ? shown_by<T>(from, turn) : value;
}

inline float* dynamic_shared() { return reinterpret_cast<float*>(block.shared()); }

// The pointer, which instructions for global memory can be given.
template <class T>
T* global(T* pointer) {
  const char* at = reinterpret_cast<const char*>(pointer);
  if (at >= block.all_shared[0] && at < block.all_shared[0] + sizeof block.all_shared) {
    fail("an access to global memory lies in what a block shares");
  }
  return pointer;
}

}  // namespace cuda_on_cpu
