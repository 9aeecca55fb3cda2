#pragma once

#include <Python.h>

// lars_gradients(param_groups, state, groups, all, keys, states, buffers, params, others)
// → the gradients of `params`, or None where a parameter among them has none, one of `others` has
// one, the groups are no longer `groups` with the parameters `all`, or the state is no longer
// `keys` → `states` with `buffers` (None: no buffer) in them. Everything is compared by identity.
PyObject* lars_gradients(PyObject*, PyObject* arguments);
