// Memory in whole pages, huge ones where they help: tiles, caches and arenas lie in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace engineroom {

// Memory of whole pages, 64-byte aligned, zeroed, in huge pages where the system gives them.
class Pages {
  public:
    explicit Pages(std::size_t bytes);
    ~Pages();
    Pages(const Pages &) = delete;
    Pages &operator=(const Pages &) = delete;
    std::uint8_t *data() const { return data_; }
    std::size_t size() const { return size_; }

  private:
    std::uint8_t *data_ = nullptr;
    std::size_t size_ = 0;
    void *mapping_ = nullptr;
    std::size_t mapped_ = 0;
};

// Room for a packed matrix. Those taken one after another lie in the same large mapping, so that
// small ones get huge pages too and are read as one stream; it lives as long as any of them.
std::shared_ptr<Pages> take_memory(std::size_t bytes, std::uint8_t **data);

}  // namespace engineroom
