// Ends every isa_*.cpp: the bodies, and their functions under the name NYBBLE_ISA. Included once a file, in no namespace.
namespace nybble::NYBBLE_ISA {

#include "body_storage.hpp"
// The bodies above work on codes as stored, those below in the kernel layout.
#include "body_math.hpp"
#include "body_layout.hpp"
#include "body_fast.hpp"
#include "body_exact.hpp"
#include "body_product.hpp"
#include "body_rows.hpp"
#include "body_shorts.hpp"
#include "body_attention.hpp"
#include "body_search.hpp"
#include "body_round.hpp"
#include "body_uniform.hpp"

}  // namespace nybble::NYBBLE_ISA

namespace nybble {
#define NYBBLE_STRING(name) #name
#define NYBBLE_NAME(name) NYBBLE_STRING(name)
extern const Kernels NYBBLE_TABLE;
const Kernels NYBBLE_TABLE = {
    NYBBLE_NAME(NYBBLE_ISA), NYBBLE_ISA::pack,         NYBBLE_ISA::unpack,   NYBBLE_ISA::decode_row,   NYBBLE_ISA::sum,
    NYBBLE_ISA::tile_codes,  NYBBLE_ISA::untile_codes, NYBBLE_ISA::tiled_row,  NYBBLE_ISA::largest_scales, NYBBLE_ISA::prepare,        NYBBLE_ISA::product,
    NYBBLE_ISA::quantize_row, NYBBLE_ISA::norm_row,    NYBBLE_ISA::best_of,    NYBBLE_ISA::append,         NYBBLE_ISA::widen_head,
    NYBBLE_ISA::attend_scratch, NYBBLE_ISA::attend,    NYBBLE_ISA::activate_row,
    NYBBLE_ISA::search_runs,   NYBBLE_ISA::nearest_row,   NYBBLE_ISA::round_sixteen,
    NYBBLE_ISA::extremes_row,  NYBBLE_ISA::uniform_row, NYBBLE_ISA::round_row};
}  // namespace nybble
