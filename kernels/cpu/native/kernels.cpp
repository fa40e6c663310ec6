// The kernels for one instruction set. Compiled once for each, with ISA naming it: `build.py` has the flags.
#include "attention.h"
#include "elementwise.h"
#include "matmul.h"

namespace tokenmill {

#define JOIN(a, b) a##b
#define TABLE(isa) JOIN(kernels_, isa)
const Kernels TABLE(ISA) = {
    ISA::prepare_row, ISA::swiglu_row, ISA::rms_norm_row, ISA::rotate_row,       ISA::greatest,
    ISA::narrow_row,  ISA::multiply,   ISA::attend,       ISA::attention_floats,
};

}  // namespace tokenmill
