// float16 by the host compiler's own type; rounds to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half value) {
    _Float16 number;
    std::memcpy(&number, &value.bits, sizeof(number));
    return static_cast<float>(number);
}

inline __half __float2half_rn(float value) {
    const _Float16 number = static_cast<_Float16>(value);
    __half result;
    std::memcpy(&result.bits, &number, sizeof(number));
    return result;
}
