"""The camera `agentview` of a scene: where it stands, what it renders, what is seen at a pixel."""

import numpy as np

from camera import extrinsics_from_mujoco, intrinsics
from rot_utils import matrix_to_quat
from runtime import UserError
from sim import moved_cameras, settings

# exact: LIBERO's picture, byte for byte. fast: 0.3 of its cost, without reflections (on the
# stove's top) and without smoothed edges. A policy is trained and evaluated on the same one.
RENDERS = ("exact", "fast")
FAST_QUALITY = {
    "offsamples": 0
}  # of MuJoCo's vis.quality: samples a pixel against jagged edges, offscreen


class Agentview:
    """The part of a `libero_env.Scene` that is about its camera."""

    def set_quality(self):
        """Set the rendering context's flags for this scene's `quality`. Called after each reset."""
        import mujoco

        # a scene that does not render has no context
        context = self.sim._render_context_offscreen
        if context is not None:
            reflection = mujoco.mjtRndFlag.mjRND_REFLECTION
            context.scn.flags[reflection] = self.quality == "exact"

    def camera(self):
        """(K (3,3), E (4,4)) of agentview at this scene's image size."""
        index = self.sim.model.camera_name2id("agentview")
        K = intrinsics(float(self.sim.model.cam_fovy[index]), self.image_size)
        return K, extrinsics_from_mujoco(
            self.sim.data.cam_xpos[index], self.sim.data.cam_xmat[index].reshape(3, 3)
        )

    def set_camera(self, E=None):
        """Put agentview at camera-to-world E (4,4), or back where the task has it, until the next
        `reset`.

        Raises RuntimeError if the camera that renders does not follow.
        """
        position, quat = self.default_camera
        if E is not None:
            # E has OpenCV axes, MuJoCo's camera looks along -z with y up: y and z change sign.
            # The roll turns a quaternion xyzw into MuJoCo's wxyz.
            position, quat = (
                E[:3, 3],
                np.roll(matrix_to_quat(E[:3, :3] @ np.diag([1.0, -1.0, -1.0])), 1),
            )
        model, index = self.sim.model, self.sim.model.camera_name2id("agentview")
        model.cam_pos[index], model.cam_quat[index] = position, quat
        self.sim.forward()
        # The model has the pose relative to the camera's body: read back where it is in the world.
        if E is not None and np.abs(self.camera()[1] - E).max() > 1e-3:
            raise RuntimeError(
                f"agentview did not move: it is at {self.camera()[1][:3, 3]}, "
                f"{E[:3, 3]} was asked for"
            )

    def set_view(self, condition):
        """Put agentview where a settings.Condition has it.

        Raises UserError in a scene whose agentview is not that of LIBERO's tabletop scenes.
        """
        # the orbit starts from the task's own view, not from the last condition's
        self.set_camera()
        if condition.theta:
            E = self.camera()[1]
            # which views are usable was computed for the tabletop camera, see settings.excluded
            if np.abs(E - settings.default_camera()[1]).max() > 1e-3:
                raise UserError(
                    "viewpoints are made for the agentview of LIBERO's tabletop scenes, "
                    f"{self.task.key} has another"
                )
            self.set_camera(settings.orbit(E, condition.theta, condition.phi))
        c = condition
        if (c.roll, c.pan, c.tilt, c.distance) != (0.0, 0.0, 0.0, 1.0):
            E = settings.loosened(self.camera()[1], c.roll, c.pan, c.tilt, c.distance)
            self.set_camera(E)
        if c.moved:
            self.set_camera(moved_cameras.moved(self.camera()[1], c.moved))

    def render(self, camera="agentview"):
        """(S,S,3) uint8 RGB, upright: MuJoCo's rows come bottom first."""
        return np.ascontiguousarray(self._draw(camera)[::-1])

    def _draw(self, camera="agentview", **how):
        # robosuite does so when a context is made, and not when it draws: of two scenes in a
        # process the older one would draw with the newer one's textures and meshes
        self.sim._render_context_offscreen.gl_ctx.make_current()
        side = self.image_size
        return self.sim.render(width=side, height=side, camera_name=camera, **how)

    def hidden(self, point, body):
        """True if something other than a body (its name) and what hangs on it stands between the
        camera and a point (3,) m in the world.
        """
        import mujoco

        model, data = self.sim.model._model, self.sim.data._data
        start, geom = self.camera()[1][:3, 3], np.zeros(1, np.int32)
        # a geom of any group may hide it, of fixed bodies too; -1: no body is left out
        share = mujoco.mj_ray(model, data, start, point - start, None, 1, -1, geom)
        root = model.body_rootid[model.geom_bodyid[geom[0]]]
        return 0 <= share < 1 and root != model.body_rootid[model.body(body).id]

    def visible_body(self, u, v):
        """Name of the body seen at pixel (u, v) of the upright image, by a segmentation render.
        None where the background is seen.
        """
        # (S,S,2): type and number of the object at each pixel, -1 for the background
        ids = self._draw(segmentation=True)[::-1]
        geom = int(ids[int(v), int(u), 1])
        return self.sim.model.body_id2name(self.sim.model.geom_bodyid[geom]) if geom >= 0 else None
