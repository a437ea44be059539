// csrc/cuda/cluster.cuh on the CPU. What a block is sent arrives with the last of it: until then its place is NaN.
#pragma once

namespace cuda_on_cpu {

inline void cluster_arrive() {
  ++block.fibers[block.current].arrivals;
  if (block.reversed) {
    wait(State::kWaitsForCluster);
  }
}
inline void cluster_wait() {  // for no more than arrivals, which may be long since over
  if (arrivals_of_all(block.blocks * blockDim.x) < block.fibers[block.current].arrivals) {
    wait(State::kWaitsForCluster);
  }
}

struct alignas(8) Mailbox {
  uint64_t expected;  // bytes, once it is open

  void open(int bytes) {
    expected = bytes;
    block.received[block.rank()] = bytes == 0;
  }
  void send(unsigned rank, float2* to, float2 what) {
    const auto there = [&](auto* here) {
      return reinterpret_cast<decltype(here)>(block.all_shared[rank] + (reinterpret_cast<char*>(here) - block.shared()));
    };
    auto& letters = block.letters[rank];
    if (rank >= block.blocks || block.received[rank] || there(this)->expected > kMaxShared) {
      fail("something is sent to where nothing is received");
    }
    letters.push_back({there(to), what});
    if (letters.size() * sizeof what == there(this)->expected) {
      for (const Letter& letter : letters) {
        *letter.to = letter.what;
      }
      block.received[rank] = true;
    }
  }
  void receive() { wait(State::kWaitsForMail); }
};

}  // namespace cuda_on_cpu
