// How large terms and their blocks may be.
#pragma once

constexpr int kBlock = 1536;   // numbers of a block at most
constexpr int kMaxLines = 64;  // lines of a term at most
