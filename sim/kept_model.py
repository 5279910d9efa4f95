"""The compiled model of an environment, kept over its resets.

robosuite compiles the scene's XML anew at every reset and uploads meshes and textures to a new
rendering context. That takes 1.7 s of CPU, and the XML nearly always is the same. With this file a
reset with the same XML puts back every number of the model that may have been changed since, and
clears the simulation's state.
"""

import functools

import numpy as np

# what nobody edits, and is large: meshes, textures, their trees, and names
CONSTANT = ("mesh_", "tex_", "hfield_", "skin_", "bvh_", "oct_", "flex", "name", "paths", "text_")


class Compiled:
    """A model's XML and its numbers as they were compiled."""

    def __init__(self, xml, model):
        self.xml = xml
        self.disabled = model.opt.disableflags
        # every array of the model but the large ones, whatever the MuJoCo version calls it
        self.numbers = {
            name: value.copy()
            for name in dir(model)
            if not name.startswith(("_", *CONSTANT))
            and isinstance(value := getattr(model, name), np.ndarray)
        }

    def put_back(self, model):
        """Undo all edits of the model: moved cameras and fixtures, hidden sites."""
        model.opt.disableflags = self.disabled
        for name, value in self.numbers.items():
            getattr(model, name)[...] = value  # in place: the array is a view of MuJoCo's memory


def keep_over_resets(environment):
    """Change robosuite's class `MujocoEnv` so that a reset compiles nothing twice."""
    initialize, destroy = environment._initialize_sim, environment._destroy_sim
    environment.compiled = None  # of the class: what an environment has before its first reset

    @functools.wraps(initialize)
    def initialize_or_put_back(self, xml_string=None):
        xml = xml_string or self.model.get_xml()
        if self.compiled is None or self.compiled.xml != xml:
            # other XML (or the first): free the old model, compile, and note the numbers
            if self.compiled is not None:
                let_go(self)
            initialize(self, xml)
            for name, value in (self.renderer_config or {}).items():
                setattr(self.sim.model.vis.quality, name, value)  # before the context is made
            self.compiled = Compiled(xml, self.sim.model._model)
            return
        # the same XML: put the numbers back and start from the initial state
        self.compiled.put_back(self.sim.model._model)
        self.sim.reset()
        self.sim.forward()
        if self.sim._render_context_offscreen is not None:
            self.sim.forward()  # as making the context does: it changes where the solver starts
        self.initialize_time(self.control_freq)

    @functools.wraps(destroy)
    def destroy_unless_kept(self):
        # robosuite destroys the simulation at the start of each reset, before it knows the XML
        if self.compiled is None:
            destroy(self)

    environment._initialize_sim = initialize_or_put_back
    environment._destroy_sim = destroy_unless_kept


def let_go(env):
    """Free the simulation that an environment keeps, so that it is built anew or closed."""
    env.compiled = None
    env._destroy_sim()
