// The Python module itself. Each op registers its schema and CPU kernel in csrc/<op>_cpu.cpp
// (STABLE_TORCH_LIBRARY_FRAGMENT), so importing simclr_fast._C is all that loading takes. The CUDA
// kernels are in a module of their own, cuda_bindings.cpp.
#include <Python.h>

#include <stdexcept>

#include "isa.h"

namespace {

PyObject* instruction_set(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(simclr::isa_name(simclr::current_isa()));
  } catch (const std::runtime_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "The set that the CPU kernels use."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
