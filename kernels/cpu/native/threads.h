// Dividing an op's work among threads that may lose their core at any moment.
//
// OpenMP's regions end when every thread has come, so that one which a neighbour keeps from its core holds up all, some
// hundred times a step. Here a region ends when its work is done, whoever did it: a thread that is late finds nothing
// left to do. Each thread takes one contiguous share, piece by piece, since weights are read as one long stream, and
// then helps the others with theirs.
#pragma once

#include <cstdint>

namespace tokenmill {

// A piece of work: [begin, end) of something that `context` knows.
using Piece = void (*)(const void* context, int64_t begin, int64_t end);

// The calling thread and up to `num_threads - 1` others do all pieces of [0, size), none smaller than `grain` but the
// last of a share; it returns when they are done, and throws what the first of them threw. From any thread; of two
// callers at a time the second works alone.
void run_parallel(int64_t size, int64_t grain, int num_threads, Piece piece, const void* context);

}  // namespace tokenmill
