// The choice among mask_columns<1> .. <8>; included inside an anonymous namespace behind its definition.
#pragma once

void mask_strip(const uint16_t* masks, const float* values, size_t columns, const float* x, size_t x_stride, int tokens,
                float* y16) {
  switch (tokens) {
    case 1:
      return mask_columns<1>(masks, values, columns, x, x_stride, y16);
    case 2:
      return mask_columns<2>(masks, values, columns, x, x_stride, y16);
    case 3:
      return mask_columns<3>(masks, values, columns, x, x_stride, y16);
    case 4:
      return mask_columns<4>(masks, values, columns, x, x_stride, y16);
    case 5:
      return mask_columns<5>(masks, values, columns, x, x_stride, y16);
    case 6:
      return mask_columns<6>(masks, values, columns, x, x_stride, y16);
    case 7:
      return mask_columns<7>(masks, values, columns, x, x_stride, y16);
    default:
      return mask_columns<8>(masks, values, columns, x, x_stride, y16);
  }
}
