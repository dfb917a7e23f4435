/* Reads the fields of a msgspec.Struct from where they lie.
 *
 * The fields of a struct are slots at fixed offsets, which their descriptors tell. Through getattr the three fields of
 * a text delta cost more than its SSE event does. An instance is frozen, so a borrowed field lives as long as it does.
 */
#ifndef CORTEX_SLOTS_H
#define CORTEX_SLOTS_H

#include <Python.h>
#include <structmember.h>

/* Return the offset of the slot that a class attribute describes, or -1 with an exception set. */
static inline Py_ssize_t slot_offset(PyObject *type, const char *name)
{
    Py_ssize_t offset = -1;
    PyObject *slot = PyObject_GetAttrString(type, name);
    if (!slot)
        return -1;
    if (Py_TYPE(slot) == &PyMemberDescr_Type && ((PyMemberDescrObject *)slot)->d_member->type == T_OBJECT_EX)
        offset = ((PyMemberDescrObject *)slot)->d_member->offset;
    else
        PyErr_Format(PyExc_ImportError, "%R keeps no slot for its field %s", type, name);
    Py_DECREF(slot);
    return offset;
}

/* Return the field at an offset, borrowed. The caller has checked the type of the object. */
static inline PyObject *slot_get(PyObject *object, Py_ssize_t offset)
{
    return *(PyObject **)((char *)object + offset);
}

#endif
