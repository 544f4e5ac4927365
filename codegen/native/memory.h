// Memory that a thread keeps from call to call: fresh pages at every call cost as much as the products of a few tokens.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

class Memory {
  public:
    Memory() = default;
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory() { free(at_); }

    // At least so many bytes, at a page; what was there before is lost. Throws std::bad_alloc.
    char *of(size_t bytes) {
        if (bytes > size_) {
            free(at_);
            size_ = 0;
            const size_t whole = (bytes + kPage - 1) / kPage * kPage;
            at_ = static_cast<char *>(std::aligned_alloc(kPage, whole));
            if (!at_) throw std::bad_alloc();
            size_ = whole;
        }
        return at_;
    }

    // Gives back what is larger than `bytes`.
    void keep(size_t bytes) {
        if (size_ <= bytes) return;
        free(at_);
        at_ = nullptr;
        size_ = 0;
    }

  private:
    static constexpr size_t kPage = 4096;
    char *at_ = nullptr;
    size_t size_ = 0;
};
