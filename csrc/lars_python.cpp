// What LARS asks of Python's objects in every step: per parameter a list, a dictionary and an
// attribute, all of which bytecode would take twice as long to read.
#include "lars_python.h"

namespace {

bool same_items(PyObject* list, PyObject* held, Py_ssize_t& next) {
  const Py_ssize_t size = PyList_Size(list);
  if (size > PyList_Size(held) - next) return false;
  for (Py_ssize_t i = 0; i < size; ++i)
    if (PyList_GetItem(list, i) != PyList_GetItem(held, next++)) return false;
  return true;
}

// Whether the groups are these objects and their parameters, one group after the other, are `all`.
bool same_groups(PyObject* groups, PyObject* held, PyObject* all, PyObject* params_key) {
  Py_ssize_t same = 0, next = 0;
  if (!same_items(groups, held, same) || same != PyList_Size(held)) return false;
  for (Py_ssize_t i = 0; i < same; ++i) {
    PyObject* const params = PyDict_GetItemWithError(PyList_GetItem(groups, i), params_key);
    if (!params || !PyList_Check(params) || !same_items(params, all, next)) return false;
  }
  return next == PyList_Size(all);
}

// Whether the state has these keys and dictionaries, in order, and in them these buffers or none.
bool same_state(PyObject* state, PyObject* keys, PyObject* values, PyObject* buffers,
                PyObject* buffer_key) {
  if (PyDict_Size(state) != PyList_Size(keys)) return false;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; PyDict_Next(state, &at, &key, &value); ++i) {
    if (key != PyList_GetItem(keys, i) || value != PyList_GetItem(values, i)) return false;
    if (!PyDict_Check(value)) return false;
    PyObject* const buffer = PyDict_GetItemWithError(value, buffer_key);
    if ((buffer ? buffer : Py_None) != PyList_GetItem(buffers, i)) return false;
  }
  return true;
}

}  // namespace

PyObject* lars_gradients(PyObject*, PyObject* arguments) {
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  static PyObject* const buffer_key = PyUnicode_InternFromString("momentum_buffer");
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  PyObject *groups, *state, *held, *all, *keys, *values, *buffers, *params, *others;
  if (!PyArg_ParseTuple(arguments, "OOO!O!O!O!O!O!O!", &groups, &state, &PyList_Type, &held,
                        &PyList_Type, &all, &PyList_Type, &keys, &PyList_Type, &values,
                        &PyList_Type, &buffers, &PyList_Type, &params, &PyList_Type, &others))
    return nullptr;
  const bool same = PyList_Check(groups) && PyDict_Check(state) &&
                    same_groups(groups, held, all, params_key) &&
                    same_state(state, keys, values, buffers, buffer_key);
  if (PyErr_Occurred()) return nullptr;
  if (!same) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyList_Size(others); ++i) {
    PyObject* const grad = PyObject_GetAttr(PyList_GetItem(others, i), grad_name);
    if (!grad) return nullptr;
    Py_DECREF(grad);
    if (grad != Py_None) Py_RETURN_NONE;
  }
  const Py_ssize_t count = PyList_Size(params);
  PyObject* const grads = PyList_New(count);
  for (Py_ssize_t i = 0; grads && i < count; ++i) {
    PyObject* const grad = PyObject_GetAttr(PyList_GetItem(params, i), grad_name);
    if (!grad || grad == Py_None) {
      Py_DECREF(grads);
      return grad;
    }
    PyList_SetItem(grads, i, grad);
  }
  return grads;
}
