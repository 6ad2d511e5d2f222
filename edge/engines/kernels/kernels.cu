// Our own CUDA kernels: flat field, threshold, mask packing. `make kernels` builds a fatbin of them for every target.
// One thread for each output element, 256 threads a block; arguments are checked by whoever launches.
// The reference of each is a line of NumPy in tests/edge/engines/test_kernels.py.

#include <cstdint>

// pixels, answer (n) uint8; gain (sensor) float32 in 1/1; dark (sensor) float32 in gray levels. n = frames * sensor.
// answer = clamp(round((pixel - dark) * gain)); round half to even, as NumPy does.
extern "C" __global__ void __launch_bounds__(256) flat_field(
    const uint8_t *__restrict__ pixels, const float *__restrict__ dark, const float *__restrict__ gain,
    uint8_t *__restrict__ answer, unsigned n, unsigned sensor)
{
    const unsigned i = blockIdx.x * 256u + threadIdx.x;
    if (i >= n)
        return;
    const unsigned at = i % sensor;
    const float value = rintf(__fmul_rn(__fsub_rn(pixels[i], dark[at]), gain[at]));
    answer[i] = static_cast<uint8_t>(fminf(fmaxf(value, 0.0f), 255.0f));
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
