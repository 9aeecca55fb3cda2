// The Python module itself. Each op registers its schema and CPU kernel in csrc/<op>_cpu.cpp
// (STABLE_TORCH_LIBRARY_FRAGMENT), so importing simclr_fast._C is all that loading takes.
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

// The -D option holds commas, so the text is made here: "sm_80,compute_120"; "" without CUDA.
#define SIMCLR_TEXT_OF(...) #__VA_ARGS__
#define SIMCLR_TEXT(...) SIMCLR_TEXT_OF(__VA_ARGS__)
#ifndef SIMCLR_CUDA_ARCHITECTURES
#define SIMCLR_CUDA_ARCHITECTURES
#endif

PyObject* cuda_architectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(SIMCLR_TEXT(SIMCLR_CUDA_ARCHITECTURES));
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "The set that the CPU kernels use."},
    {"cuda_architectures", cuda_architectures, METH_NOARGS, "GPU code in this binary."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
