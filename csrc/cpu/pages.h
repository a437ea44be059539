// Pages of memory: what the operating system is told and asked about the memory of large tensors. Only Linux is: for
// others nothing is told, and every page counts as written.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <memory>
#endif

namespace diffkern {

// The pages that n bytes lie in.
class Pages {
 public:
  Pages(const void* memory, size_t n) : bytes_(n) {
#ifdef __linux__
    size_ = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<uintptr_t>(memory);
    begin_ = address / size_ * size_;
    end_ = (address + n + size_ - 1) / size_ * size_;
#endif
  }

  // Ask for large pages behind memory that is about to be filled: handing out small ones can take longer than that.
  void prefer_huge() const {
#ifdef __linux__
    if (bytes_ >= kHuge) {
      madvise(reinterpret_cast<void*>(begin_), end_ - begin_, MADV_HUGEPAGE);
    }
#endif
  }

  // Give back the memory of pages that are a file's and not written: whoever reads them again gets the same. Nobody may
  // write to them meanwhile.
  void give_back() const {
#ifdef __linux__
    if (!written()) {
      madvise(reinterpret_cast<void*>(begin_), end_ - begin_, MADV_DONTNEED);
    }
#endif
  }

  // Whether one private mapping of a file has all of these pages, and they are worth giving back.
  bool are_of_a_file() const {
#ifdef __linux__
    if (bytes_ < kWorthwhile) {
      return false;
    }
    const std::unique_ptr<FILE, int (*)(FILE*)> maps(std::fopen("/proc/self/maps", "re"), std::fclose);
    char line[512], kind = 0;
    uintptr_t begin, end;
    uint64_t file;
    while (maps && std::fgets(line, sizeof line, maps.get())) {
      if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %*3c%c %*s %*s %" SCNu64, &begin, &end, &kind, &file) == 4 &&
          begin <= begin_ && begin_ < end) {
        return end_ <= end && kind == 'p' && file != 0;
      }
    }
#endif
    return false;
  }

  // Whether one of these pages may have been written. Of a file's private page that makes a copy.
  bool written() const {
#ifdef __linux__
    // Of a page there are 64 bits: 63 says that it is in memory, 62 that it is swapped out, 61 that it is a file's.
    constexpr uint64_t kPresent = uint64_t{3} << 62, kFile = uint64_t{1} << 61;
    constexpr uintptr_t kMany = 512;
    uint64_t entries[kMany];
    const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    bool found = map < 0;
    for (uintptr_t page = begin_ / size_, last = end_ / size_; page < last && !found; page += kMany) {
      const size_t bytes = std::min(kMany, last - page) * sizeof(uint64_t);
      found = pread(map, entries, bytes, static_cast<off_t>(page * sizeof(uint64_t))) != static_cast<ssize_t>(bytes) ||
              std::any_of(entries, entries + bytes / sizeof(uint64_t),
                          [](uint64_t entry) { return (entry & kPresent) != 0 && (entry & kFile) == 0; });
    }
    if (map >= 0) {
      close(map);
    }
    return found;
#else
    return true;
#endif
  }

 private:
#ifdef __linux__
  static constexpr size_t kHuge = 4 << 20;         // below, it holds few large pages
  static constexpr size_t kWorthwhile = 256 << 10;  // below, to find out takes longer than the memory is worth

  uintptr_t begin_, end_, size_;
#endif
  size_t bytes_;
};

}  // namespace diffkern
