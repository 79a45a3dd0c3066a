/* The instructions of PTX that are more than an operator of C; each translated kernel includes this. */
#pragma once
#include "interface.h"
#include <math.h>
#include <string.h>
static Runtime *runtime;

#include "numbers.h"

#include "memory.h"

#include "together.h"
