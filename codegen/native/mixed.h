// An expert's rows in two parts: whole vectors of tokens in lanes, and what is left over along the rows.
#pragma once
#include "lanes.h"

namespace {

template <class Dot>
struct Mixed {
    using Lanes = ByLanes<Dot>;
    using Along = ByRows<Dot>;

    // How many of so many rows, the first ones, go in lanes. A vector of tokens costs as much however many there are of
    // it; along the rows tokens are taken kDotTokens at a time, and as many take, measured, 1.2 times as long.
    static int32_t in_lanes(int32_t rows) {
        const int32_t whole = rows / Vec::kLanes * Vec::kLanes, left = rows - whole;
        return 5 * Vec::kLanes <= 6 * round_up(left, kDotTokens) ? rows : whole;
    }

    static size_t packed_bytes(const Rows &rows) {
        return past(Lanes::packed_bytes(head(rows))) + Along::packed_bytes(tail(rows));
    }
    static size_t hidden_bytes(const Rows &rows) {
        return past(Lanes::hidden_bytes(head(rows))) + Along::hidden_bytes(tail(rows));
    }
    static size_t panel_bytes(const Ffn &f) {
        const size_t a = Lanes::panel_bytes(f), b = Along::panel_bytes(f);
        return a > b ? a : b;
    }

    static void pack(const Batch &batch, const Rows &rows, Worker &worker) {
        if (rows.tiled > 0) Lanes::pack(batch, head(rows), worker);
        if (rows.tiled < rows.count) Along::pack(batch, tail(rows), worker);
    }

    static void first(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        if (rows.tiled == rows.count) return Lanes::first(batch, rows, range, worker);
        if (rows.tiled == 0) return Along::first(batch, rows, range, worker);
        const Rows a = head(rows), b = tail(rows);
        for (int64_t from = range.from; from < range.to; from += kHiddenStep) {
            const int64_t to = least(from + kHiddenStep, range.to);
            Ahead rest = to < range.to ? before_first(rows, to, least(to + kHiddenStep, range.to)) : range.next;
            const Ahead share = taken(rest, rows);
            Lanes::first(batch, a, {from, to, share}, worker);
            Along::first(batch, b, {from, to, rest}, worker);
        }
    }

    static void second(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        if (rows.tiled == rows.count) return Lanes::second(batch, rows, range, worker);
        if (rows.tiled == 0) return Along::second(batch, rows, range, worker);
        const Rows a = head(rows), b = tail(rows);
        for (int64_t from = range.from; from < range.to; from += kHiddenStep) {
            const int64_t to = least(from + kHiddenStep, range.to);
            Ahead rest = to < range.to ? before_second(rows, to, least(to + kHiddenStep, range.to)) : range.next;
            const Ahead share = taken(rest, rows);
            Lanes::second(batch, a, {from, to, share}, worker);
            Along::second(batch, b, {from, to, rest}, worker);
        }
    }

  private:
    static size_t past(size_t bytes) { return (bytes + 63) / 64 * 64; }

    static Rows head(const Rows &rows) {
        Rows part = rows;
        part.count = rows.tiled;
        return part;
    }
    static Rows tail(const Rows &rows) {
        Rows part = rows;
        part.count = rows.count - rows.tiled;
        part.tiled = 0;
        if (rows.pairs) part.pairs += rows.tiled;
        part.first_pair += rows.tiled;
        if (rows.packed) part.packed += past(Lanes::packed_bytes(head(rows)));
        if (rows.hidden) part.hidden += past(Lanes::hidden_bytes(head(rows)));
        return part;
    }

    // The share of the first rows in what is read ahead, taken from it.
    static Ahead taken(Ahead &rest, const Rows &rows) {
        Ahead share = rest;
        share.lines = rest.lines * rows.tiled / rows.count;
        rest.lines -= share.lines;
        for (const char *&at : rest.at) at += 64 * share.lines;
        return share;
    }
};

}  // namespace
