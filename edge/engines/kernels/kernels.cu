// Our own CUDA kernels: flat field, threshold, mask packing. `make kernels` builds a fatbin of them for every target.
// One thread for each output element, 256 threads a block; arguments are checked by whoever launches.
// tests/edge/engines/test_kernels.py runs this source on the CPU as well, against `stages.flatfield` and numpy.packbits.

#include <cstdint>

// Where a frame lies in its flat field: `maps` is dark (height, width, channels) float32 in gray levels, then gain of the
// same shape in 1/1; null leaves the frame alone. The frame's pixel (0, 0) is (top, left) there. PLACE in device.py.
struct Place {
    const float *maps;
    int top, left, height, width, channels, unused;
};

// The place of `i` on an axis of `side` that reflection continues for ever, the outermost single; as stages.tile does.
static __device__ __forceinline__ int reflected(int i, int side)
{
    if (static_cast<unsigned>(i) < static_cast<unsigned>(side))
        return i;
    if (side == 1)
        return 0;
    const int period = 2 * side - 2;
    i %= period;
    i += i < 0 ? period : 0;
    return i < side ? i : period - i;
}

// frames (n / (height * width * channels), height, width, channels) uint8, corrected in place; a place for each.
// frame = clamp(round((frame - dark) * gain)); round half to even, as NumPy does. Gray that became RGB has one field.
extern "C" __global__ void __launch_bounds__(256) flat_field(
    uint8_t *__restrict__ frames, const Place *__restrict__ places, unsigned n, unsigned height, unsigned width,
    unsigned channels)
{
    const unsigned i = blockIdx.x * 256u + threadIdx.x;
    if (i >= n)
        return;
    const unsigned pixel = i / channels, row = pixel / width, frame = row / height;
    const Place place = places[frame];
    if (place.maps == nullptr)
        return;
    const int y = reflected(place.top + static_cast<int>(row - frame * height), place.height);
    const int x = reflected(place.left + static_cast<int>(pixel - row * width), place.width);
    const int c = min(static_cast<int>(i - pixel * channels), place.channels - 1);
    const float *dark = place.maps + (static_cast<size_t>(y) * place.width + x) * place.channels + c;
    const float *gain = dark + static_cast<size_t>(place.height) * place.width * place.channels;
    const float value = rintf(__fmul_rn(__fsub_rn(frames[i], *dark), *gain));
    frames[i] = static_cast<uint8_t>(fminf(fmaxf(value, 0.0f), 255.0f));
}

// cells (rows, width) float32 -> packed (rows, ceil(width / 8)) uint8: the threshold and its mask in one pass, an eighth
// of a byte a cell instead of four. The first cell is the highest bit, as in numpy.packbits; a row starts a new byte. What is
// no number cannot be compared, and is held to be above.
extern "C" __global__ void __launch_bounds__(256) threshold_pack(
    const float *__restrict__ cells, uint8_t *__restrict__ packed, float limit, unsigned rows, unsigned width)
{
    const unsigned bytes = (width + 7u) / 8u;
    const unsigned i = blockIdx.x * 256u + threadIdx.x;
    if (i >= rows * bytes)
        return;
    const unsigned first = (i % bytes) * 8u;
    const float *row = cells + static_cast<size_t>(i / bytes) * width;
    unsigned bits = 0;
#pragma unroll
    for (unsigned k = 0; k < 8u; ++k)
        bits = bits << 1 | (first + k < width && !(row[first + k] <= limit));
    packed[i] = static_cast<uint8_t>(bits);
}
