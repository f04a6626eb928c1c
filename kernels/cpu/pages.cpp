// Memory in whole pages, and the shelf on which packed matrices lie side by side.
#include "pages.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace engineroom {
namespace {

std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// The mapping in use and how much of it is taken. It belongs to the matrices in it; this only
// remembers where the next one may lie.
struct Shelf {
    std::mutex mutex;
    std::weak_ptr<Pages> pages;
    std::size_t used = 0;
};

constexpr std::size_t kShelfBytes = std::size_t{64} << 20;

}  // namespace

Pages::Pages(std::size_t bytes) : size_(padded(std::max<std::size_t>(bytes, 1))) {
#if defined(__linux__)
    constexpr std::size_t kHuge = std::size_t{2} << 20;
    mapped_ = size_ + kHuge;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(mapping_);
    data_ = reinterpret_cast<std::uint8_t *>((start + kHuge - 1) / kHuge * kHuge);
    madvise(data_, size_, MADV_HUGEPAGE);  // a wish: without it all works, slower
#else
    mapping_ = std::aligned_alloc(64, size_);
    if (mapping_ == nullptr) throw std::bad_alloc();
    data_ = static_cast<std::uint8_t *>(mapping_);
    std::memset(data_, 0, size_);
#endif
}

Pages::~Pages() {
#if defined(__linux__)
    munmap(mapping_, mapped_);
#else
    std::free(mapping_);
#endif
}

std::shared_ptr<Pages> take_memory(std::size_t bytes, std::uint8_t **data) {
    static Shelf shelf;
    const std::lock_guard<std::mutex> lock(shelf.mutex);
    std::shared_ptr<Pages> pages = shelf.pages.lock();
    if (!pages || pages->size() - shelf.used < bytes) {
        pages = std::make_shared<Pages>(std::max(bytes, kShelfBytes));
        shelf.pages = pages;
        shelf.used = 0;
    }
    *data = pages->data() + shelf.used;
    shelf.used += padded(bytes);
    return pages;
}

}  // namespace engineroom
