// What follows a linear layer, in place; included inside an anonymous namespace behind vectors.h.
#pragma once

typedef int32_t IntVector __attribute__((vector_size(MFCOMPILE_LANES * 4)));

inline Vector all(float value) { return Vector{} + value; }

// e^x to two units in the last place, 0 under -87.3 but for the least normal number, infinity from 88.8; after Cephes' expf.
inline Vector exponential(Vector x) {
  x = x < -87.3f ? all(-87.3f) : x;  // a NaN stays
  x = x > 88.8f ? all(88.8f) : x;
  const float kRounding = 12582912.0f;  // 1.5 * 2^23: sums with it are whole numbers
  const Vector power = (x * 1.44269504f + kRounding) - kRounding;
  const Vector rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  Vector sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * (rest * rest) + rest + 1.0f;
  const IntVector bits = (__builtin_convertvector(power, IntVector) + 127) << 23;
  return sum * reinterpret_cast<Vector>(bits);
}

inline Vector sigmoid_times(Vector x, Vector slope_x) { return x * (1.0f / (1.0f + exponential(-slope_x))); }

// x (1 + erf(x / sqrt 2)) / 2, with the complement of erf by formula 7.1.26 of Abramowitz and Stegun, exact to 1.5e-7.
inline Vector gelu(Vector x) {
  Vector size = x < 0.0f ? -x : x;
  size = size > 20.0f ? all(20.0f) : size;  // its complement is 0; and 0 * infinity would not be
  const Vector t = 1.0f / (1.0f + size * (0.3275911f * 0.70710678f));
  Vector sum = t * 1.061405429f - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const Vector complement = sum * t * exponential(size * size * -0.5f);
  const Vector y = (x > 0.0f ? x : Vector{}) - 0.5f * size * complement;
  return x < -3.4028235e38f ? all(__builtin_nanf("")) : y;  // -infinity * 0, as in the formula
}

inline Vector activated(Activation activation, Vector x) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0.0f ? Vector{} : x;  // a NaN stays
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:  // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
      return sigmoid_times(x, 1.59576912f * (x + 0.044715f * x * x * x));
    case Activation::kQuickGelu:
      return sigmoid_times(x, 1.702f * x);
    case Activation::kSilu:
      return sigmoid_times(x, x);
    default:
      return x;
  }
}

template <Activation kActivation>
void activate_all(float* y, size_t count) {
  size_t index = 0;
  for (; index + kLanes <= count; index += kLanes) store(y + index, activated(kActivation, load(y + index)));
  float rest[kLanes] = {};
  for (size_t lane = 0; index + lane < count; ++lane) rest[lane] = y[index + lane];
  store(rest, activated(kActivation, load(rest)));
  for (size_t lane = 0; index + lane < count; ++lane) y[index + lane] = rest[lane];
}

void activate(Activation activation, float* y, size_t count) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return activate_all<Activation::kRelu>(y, count);
    case Activation::kGelu:
      return activate_all<Activation::kGelu>(y, count);
    case Activation::kGeluTanh:
      return activate_all<Activation::kGeluTanh>(y, count);
    case Activation::kQuickGelu:
      return activate_all<Activation::kQuickGelu>(y, count);
    case Activation::kSilu:
      return activate_all<Activation::kSilu>(y, count);
  }
}
