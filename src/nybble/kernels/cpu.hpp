// Which instruction sets this machine can run, and the one in use.
#pragma once

#include "kernels.hpp"

#include <string>
#include <vector>

namespace nybble {

std::vector<const Kernels*> usable();  // the best one last
const Kernels& kernels();              // the one in use: the best, unless select() was called
bool select(const std::string& name);  // false: this machine cannot run it

}  // namespace nybble
