"""How images are rendered: checks of the environment's variables before anything starts, and the
renderer's name.

robosuite renders through EGL. It reads MUJOCO_GL, MUJOCO_EGL_DEVICE_ID and CUDA_VISIBLE_DEVICES. A
value that it cannot use ends in a traceback of forty lines, or an assertion, in the first worker
after half a minute. These checks come before, and end in one sentence.
"""

import contextlib
import ctypes.util
import os

from runtime import UserError

APT = (
    "sudo apt-get update && sudo apt-get install -y "
    "libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libglib2.0-0"
)
DEVICE, VISIBLE = "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES"
SOFTWARE = ("llvmpipe", "softpipe", "swrast", "SWR")  # Mesa's renderers on the CPU


def check_platform(environ):
    """Raise UserError naming the variable that asks for another way of rendering than EGL.
    environ: the environment's variables.
    """
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        value = environ.get(name, "").strip()
        if value and value.lower() != "egl":
            raise UserError(
                f"{name}={value}: images are rendered through EGL only, which needs no screen; "
                f"unset {name}, or set it to egl"
            )


def choose_device(environ, devices):
    """The index of the EGL device to render on.

    environ: the environment's variables; devices: for each EGL device, whether it can be
    initialised. MUJOCO_EGL_DEVICE_ID is taken where it is set. Else it is the first of
    CUDA_VISIBLE_DEVICES, as in robosuite, if that is a device that works, else the first that does.
    Raises UserError naming the variable.
    """
    working = [i for i, works in enumerate(devices) if works]
    if not working:
        raise UserError(
            f"EGL has {len(devices)} devices here and none can be used, "
            f"so nothing can be rendered. Install a driver: {APT}"
        )
    asked = environ.get(DEVICE, "").strip()
    if asked:
        if not (asked.isascii() and asked.isdigit() and int(asked) < len(devices)):
            here = "device 0 only" if len(devices) == 1 else f"devices 0 to {len(devices) - 1}"
            raise UserError(
                f"{DEVICE}={asked}: EGL has {here} here; "
                f"unset {DEVICE}, or set it to one that there is"
            )
        if int(asked) not in working:
            raise UserError(
                f"{DEVICE}={asked}: this EGL device cannot be initialised (no permission, or no "
                f"driver); unset {DEVICE}, or set it to {' or '.join(map(str, working))}"
            )
        return int(asked)
    # CUDA's numbers may also be UUIDs, or none: then the first device that works
    first = environ.get(VISIBLE, "").split(",")[0].strip()
    return (
        int(first) if first.isascii() and first.isdigit() and int(first) in working else working[0]
    )


def egl_devices():
    """For each EGL device of this machine, whether it can be initialised -> [bool]."""
    from mujoco.egl import egl_ext as EGL
    from OpenGL.error import GLError

    def works(device):
        display = EGL.eglGetPlatformDisplayEXT(EGL.EGL_PLATFORM_DEVICE_EXT, device, None)
        # a device without a driver or permission raises, or answers that it has no display
        with contextlib.suppress(GLError):
            return (
                display != EGL.EGL_NO_DISPLAY
                and EGL.eglInitialize(display, None, None) == EGL.EGL_TRUE
            )
        return False

    return [bool(works(device)) for device in EGL.eglQueryDevicesEXT()]


def prepare():
    """Check the renderer's variables and set those that robosuite needs, for this process and its
    workers. Raises UserError.
    """
    check_platform(os.environ)  # first: a wrong MUJOCO_GL breaks the import of mujoco
    if not ctypes.util.find_library("EGL"):
        raise UserError(f"libEGL.so is missing, so nothing can be rendered. Install it: {APT}")
    os.environ.update(MUJOCO_GL="egl", PYOPENGL_PLATFORM="egl")
    os.environ.setdefault("LP_NUM_THREADS", "2")  # threads of llvmpipe, Mesa's software renderer
    try:
        devices = egl_devices()
    except Exception as error:
        raise UserError(
            f"EGL cannot be used here ({type(error).__name__}: {error}). Install it: {APT}"
        ) from error
    os.environ[DEVICE] = str(choose_device(os.environ, devices))


@contextlib.contextmanager
def all_devices_visible():
    """Hide CUDA_VISIBLE_DEVICES while robosuite is imported.

    robosuite asserts that the EGL device's number occurs in that variable. But it holds CUDA's
    numbers, or UUIDs, or nothing.
    """
    visible = os.environ.pop(VISIBLE, None)
    try:
        yield
    finally:
        if visible is not None:
            os.environ[VISIBLE] = visible


def kind_of(renderer):
    """What a renderer's name means to a user: 'software rendering' or 'a GPU'."""
    return "software rendering" if renderer.startswith(SOFTWARE) else "a GPU"
