// `DSMOE_TARGET("avx2,fma")`: from here on the file is compiled for these instructions, whatever the command line says.
#pragma once
#define DSMOE_TEXT(x) #x
#ifdef __clang__
#define DSMOE_TARGET(features) \
    _Pragma(DSMOE_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define DSMOE_TARGET_END _Pragma("clang attribute pop")
#else
#define DSMOE_TARGET(features) _Pragma("GCC push_options") _Pragma(DSMOE_TEXT(GCC target(features)))
#define DSMOE_TARGET_END _Pragma("GCC pop_options")
#endif
