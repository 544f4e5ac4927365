#include "schedule.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

#include "term_limits.h"
#include "memory.h"

namespace {

// Rows of an expert that one thread takes at once: packed and hidden they stay in its cache, so many bytes of which are
// left beside the weights; fewer rows would not be worth reading the weights once more.
constexpr int64_t kRowBytes = 1 << 20, kLeastRows = 96, kMostRows = 256;
// Bytes of y at most, and of what a thread keeps from call to call; more tokens are taken in several turns.
constexpr size_t kMaxSums = size_t(96) << 20;
constexpr int64_t kMinTokens = 256;
// Sums larger than this are written past the caches.
constexpr size_t kCache = size_t(8) << 20;
// A thread would wait so much of the time for another, at most, before experts are divided among threads.
constexpr double kMaxIdle = 0.06;
// Outputs of an expert's products that a thread takes at once when experts are divided.
constexpr int64_t kShareBytes = 128 << 10;

struct Item {
    Rows rows;
    double cost;
};

// A thread takes one range of outputs of one item's products.
struct Share {
    int32_t item;
    int64_t from, to;
};

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// An expert's rows, in parts of about the same size that are whole tiles.
void add_items(std::vector<Item> &items, const Ffn &ffn, int64_t expert, const int32_t *pairs, int32_t first,
               int32_t count, const Kernels &kernels) {
    const int64_t bytes = std::max<int64_t>(1, (ffn.hidden + ffn.width) * element_bytes(ffn.dtype));
    const int64_t most = std::clamp(kRowBytes / bytes, kLeastRows, kMostRows), parts = (count + most - 1) / most;
    const int32_t size = static_cast<int32_t>(round_up((count + parts - 1) / parts, parts > 1 ? 32 : 1));
    for (int32_t begin = 0; begin < count; begin += size) {
        const int32_t n = std::min(size, count - begin);
        Rows rows{&ffn,    expert, pairs ? pairs + begin : nullptr, first + begin, n, kernels.tiled(ffn, n),
                  nullptr, nullptr};
        // Reading an expert's weights takes as long as multiplying them with some ten rows.
        const double weights = static_cast<double>(ffn.products * ffn.hidden + ffn.out) * ffn.width;
        items.push_back({rows, weights * std::max(n, 12)});
    }
}

// How much longer the threads take than if they all ended together, each taking the largest item that is left.
double idle(const std::vector<Item> &items, int threads) {
    std::vector<double> busy(threads, 0.0);
    double total = 0.0;
    for (const Item &item : items) {
        *std::min_element(busy.begin(), busy.end()) += item.cost;
        total += item.cost;
    }
    return total > 0.0 ? *std::max_element(busy.begin(), busy.end()) * threads / total - 1.0 : 0.0;
}

class Turn {
  public:
    Turn(const Ffn &routed, const Ffn *shared, const Call &call, const Kernels &kernels)
        : routed_(routed), shared_(shared), call_(call), kernels_(kernels) {}

    // Tokens from `begin` on, `count` of them. Ids must have been checked.
    void run(int64_t begin, int64_t count, Memory &memory) {
        begin_ = begin;
        count_ = count;
        plan();
        threads_ = std::max(1, call_.threads);
        const bool whole = idle(items_, threads_) <= kMaxIdle;
        const size_t sums = aligned(sizeof(float) * count * (call_.slots + (shared_ ? 1 : 0)) * routed_.out);
        past_caches_ = sums > kCache && routed_.out % 16 == 0;
        const size_t panels = std::max(kernels_.panel_bytes(routed_), shared_ ? kernels_.panel_bytes(*shared_) : 0);
        const size_t values = sizeof(float) * kBlock * kMaxLines;
        size_t rows = 0;  // of one worker, or of all items
        for (Item &item : items_) {
            const size_t needed = aligned(kernels_.packed_bytes(item.rows)) + aligned(kernels_.hidden_bytes(item.rows));
            rows = whole ? std::max(rows, needed) : rows + needed;
        }
        const size_t own = values + aligned(panels) + (whole ? rows : 0);
        char *at = memory.of(sums + own * threads_ + (whole ? 0 : rows));
        y_ = reinterpret_cast<float *>(at);
        char *workers = at + sums;
        if (!whole) {
            char *next = workers + own * threads_;
            for (Item &item : items_) next = place(item.rows, next);
            divide();
        }
        added_.resize(threads_ * (call_.slots + 1));
        factors_.resize(added_.size());
        next_ = 0, packed_ = 0, first_ = 0, second_ = 0;
#pragma omp parallel num_threads(threads_)
        {
            char *mine = workers + own * omp_get_thread_num();
            Worker worker{reinterpret_cast<float *>(mine), mine + values};
            kernels_.enter();
            if (whole)
                take_items(worker, mine + values + aligned(panels));
            else
                take_shares(worker);
            kernels_.leave();
#pragma omp barrier
            add_up(omp_get_thread_num(), omp_get_num_threads());
        }
    }

  private:
    Batch batch(const Rows &rows) const {
        const size_t size = element_bytes(routed_.dtype);
        Batch b;
        b.x = static_cast<const char *>(call_.x) + begin_ * call_.per_token * size;
        b.per_token = call_.per_token;
        const bool routed = rows.ffn == &routed_;
        b.slots = routed ? call_.slots : 1;
        const std::vector<float> &weights = routed ? weights_ : gates_;
        b.weights = weights.empty() ? nullptr : weights.data();
        b.y = routed ? y_ : y_ + count_ * call_.slots * routed_.out;
        b.past_caches = past_caches_;
        return b;
    }

    // The pairs in the experts' order, and what is to be done, the largest first.
    void plan() {
        const int64_t pairs = count_ * call_.slots;
        const int64_t *ids = call_.ids + begin_ * call_.slots;
        std::vector<int32_t> start(routed_.experts + 1, 0);
        for (int64_t p = 0; p < pairs; p++)
            if (ids[p] >= 0) start[ids[p] + 1]++;
        for (int64_t e = 0; e < routed_.experts; e++) start[e + 1] += start[e];
        order_.resize(pairs);
        std::vector<int32_t> at(start.begin(), start.end() - 1);
        for (int64_t p = 0; p < pairs; p++)
            if (ids[p] >= 0) order_[at[ids[p]]++] = static_cast<int32_t>(p);
        widen(weights_, call_.weights, call_.weights_dtype, begin_ * call_.slots, pairs);
        widen(gates_, call_.gates, call_.gates_dtype, begin_, count_);
        items_.clear();
        if (shared_) add_items(items_, *shared_, 0, nullptr, 0, static_cast<int32_t>(count_), kernels_);
        for (int64_t e = 0; e < routed_.experts; e++)
            if (start[e + 1] > start[e])
                add_items(items_, routed_, e, order_.data() + start[e], 0, start[e + 1] - start[e], kernels_);
        std::stable_sort(items_.begin(), items_.end(), [](const Item &a, const Item &b) { return a.cost > b.cost; });
    }

    static void widen(std::vector<float> &to, const void *from, int32_t dtype, int64_t begin, int64_t count) {
        to.resize(from ? count : 0);
        for (size_t i = 0; i < to.size(); i++) to[i] = number(from, dtype, begin + static_cast<int64_t>(i));
    }

    char *place(Rows &rows, char *at) const {
        rows.packed = at;
        rows.hidden = at + aligned(kernels_.packed_bytes(rows));
        return rows.hidden + aligned(kernels_.hidden_bytes(rows));
    }

    // Each thread takes one item after another, and reads ahead into the next.
    void take_items(Worker &worker, char *own) {
        const int64_t count = static_cast<int64_t>(items_.size());
        for (int64_t i = next_++, next; i < count; i = next) {
            next = next_++;
            Rows rows = items_[i].rows;
            place(rows, own);
            const Batch b = batch(rows);
            const Ffn &f = *rows.ffn;
            kernels_.pack(b, rows, worker);
            kernels_.first(b, rows, {0, f.width, before_second(rows, 0, std::min(kOutStep, f.out))}, worker);
            Ahead after;
            if (next < count)
                after = before_first(items_[next].rows, 0, std::min(kHiddenStep, items_[next].rows.ffn->width));
            kernels_.second(b, rows, {0, f.out, after}, worker);
        }
    }

    // Ranges of outputs of all items' products, about kShareBytes of weights each.
    void divide() {
        firsts_.clear(), seconds_.clear();
        for (int32_t i = 0; i < static_cast<int32_t>(items_.size()); i++) {
            const Ffn &f = *items_[i].rows.ffn;
            const int64_t size = static_cast<int64_t>(element_bytes(f.dtype));
            split(firsts_, i, f.width, share(f.products * f.hidden * size, kHiddenStep));
            split(seconds_, i, f.out, share(f.width * size, kOutStep));
        }
    }

    // Outputs of a share, in steps; rows of no bytes are those of an expert without hidden numbers.
    static int64_t share(int64_t row_bytes, int64_t step) {
        return round_up(std::max<int64_t>(1, kShareBytes / std::max<int64_t>(1, row_bytes)), step);
    }

    static void split(std::vector<Share> &shares, int32_t item, int64_t outputs, int64_t step) {
        for (int64_t from = 0; from < outputs; from += step)
            shares.push_back({item, from, std::min(from + step, outputs)});
    }

    // All threads work on the same items: first on their first products, then on their last.
    void take_shares(Worker &worker) {
        for (size_t i = packed_++; i < items_.size(); i = packed_++)
            kernels_.pack(batch(items_[i].rows), items_[i].rows, worker);
#pragma omp barrier
        for (size_t i = first_++, next; i < firsts_.size(); i = next) {
            next = first_++;
            const Share share = firsts_[i];
            const Rows &rows = items_[share.item].rows;
            Ahead after;
            if (next < firsts_.size())
                after = before_first(items_[firsts_[next].item].rows, firsts_[next].from,
                                     std::min(firsts_[next].from + kHiddenStep, firsts_[next].to));
            kernels_.first(batch(rows), rows, {share.from, share.to, after}, worker);
        }
#pragma omp barrier
        for (size_t i = second_++, next; i < seconds_.size(); i = next) {
            next = second_++;
            const Share share = seconds_[i];
            const Rows &rows = items_[share.item].rows;
            Ahead after;
            if (next < seconds_.size())
                after = before_second(items_[seconds_[next].item].rows, seconds_[next].from,
                                      std::min(seconds_[next].from + kOutStep, seconds_[next].to));
            kernels_.second(batch(rows), rows, {share.from, share.to, after}, worker);
        }
    }

    // Each token's rows in the order of its slots, the shared experts' last: the same sum whoever computed them.
    void add_up(int thread, int threads) {
        const int64_t width = routed_.out, slots = call_.slots;
        const size_t size = element_bytes(call_.out_dtype);
        const float **rows = added_.data() + thread * (slots + 1);
        float *factors = factors_.data() + thread * (slots + 1);
        for (int64_t t = count_ * thread / threads; t < count_ * (thread + 1) / threads; t++) {
            int n = 0;
            for (int64_t pair = t * slots; pair < (t + 1) * slots; pair++) {
                if (call_.ids[begin_ * slots + pair] < 0) continue;
                factors[n] = routed_.weighted ? weights_[pair] : 1.f;
                rows[n++] = y_ + pair * width;
            }
            if (shared_) {
                factors[n] = shared_->weighted ? gates_[t] : 1.f;
                rows[n++] = y_ + (count_ * slots + t) * width;
            }
            kernels_.add(rows, factors, n, width, call_.out_dtype,
                         static_cast<char *>(call_.out) + (begin_ + t) * width * size);
        }
    }

    const Ffn &routed_;
    const Ffn *shared_;
    const Call &call_;
    const Kernels &kernels_;
    int64_t begin_ = 0, count_ = 0;
    int threads_ = 1;
    float *y_ = nullptr;
    bool past_caches_ = false;
    std::vector<int32_t> order_;
    std::vector<float> weights_, gates_;
    std::vector<Item> items_;
    std::vector<Share> firsts_, seconds_;
    std::vector<const float *> added_;  // what each thread adds up for a token
    std::vector<float> factors_;        // and by which numbers
    std::atomic<size_t> packed_{0}, first_{0}, second_{0};
    std::atomic<int64_t> next_{0};
};

}  // namespace

Status run(const Ffn &routed, const Ffn *shared, const Call &call, const Kernels &kernels) noexcept {
    for (int64_t p = 0; p < call.tokens * call.slots; p++)
        if (call.ids[p] < -1 || call.ids[p] >= routed.experts) return kBadExpert;
    try {
        thread_local Memory memory;
        Turn turn(routed, shared, call, kernels);
        const size_t row = std::max<size_t>(1, sizeof(float) * (call.slots + (shared ? 1 : 0)) * routed.out);
        const int64_t most = std::max(kMinTokens, static_cast<int64_t>(kMaxSums / row));
        const int64_t turns = (call.tokens + most - 1) / most;
        for (int64_t i = 0; i < turns; i++) {
            const int64_t begin = call.tokens * i / turns;
            turn.run(begin, call.tokens * (i + 1) / turns - begin, memory);
        }
        memory.keep(kMaxSums + (kMaxSums >> 2));
    } catch (const std::exception &) {  // no memory, or a size beyond all memory
        return kNoMemory;
    }
    return kDone;
}
