"""Where the objects of a scene are: random and shifted layouts, settled and checked."""

import numpy as np

from runtime import UserError

ROBOT_DOF = 9  # seven arm joints and two fingers come first in every LIBERO state
# rad; the spread of the arm's joints over the benchmark's 50 init states (0.018-0.023)
JOINT_JITTER = 0.02
UPRIGHT = np.radians(8)
UPRIGHT_COS = np.cos(UPRIGHT)


def upright(joint):
    """Cosine between an object's own z axis and the vertical. joint: its seven numbers, xyz and
    the quaternion wxyz.
    """
    # the entry (2,2) of the quaternion's matrix
    x, y = joint[4:6]
    return 1 - 2 * (x * x + y * y)


class Placement:
    """The part of a `libero_env.Scene` that is about where its objects are."""

    def _nominal_rest(self):
        """How the movable objects come to rest in the benchmark's first init state, in which they
        start 7 cm in the air -> ({name: height in m}, {name: (m that it moved aside, rad of its
        tilt)} of those that lean, as a bowl on a ramekin does).
        """
        start = self.init_states()[0]
        self.begin_episode(start)
        state = self.state()
        heights = {n: float(self.position(n)[2]) for n in self.objects}
        leaning = {}
        for name in self.objects:
            a = self._address(name)
            if upright(state[a]) < UPRIGHT_COS:
                aside = float(np.linalg.norm(state[a][:2] - start[a][:2]))
                leaning[name] = aside, float(np.arccos(upright(state[a])))
        return heights, leaning

    def _settle(self, state, watch):
        """Let objects come to rest from `state` (S,) -> the settled state (S,), or None for a bad
        layout. The robot and the clock are put back, velocities are zero.

        watch: names of the objects that are checked. None is returned where one of them moved by
        more than 1 cm, tipped, or rests more than 3 mm from its height in the benchmark. One that
        leans there may move and tip as far as it does there besides.
        """
        self.begin_episode(state)
        after = self.state()
        for name in watch:
            a = self._address(name)
            aside, lean = self.leaning.get(name, (0.0, 0.0))
            tilt = upright(after[a])
            tipped = tilt < UPRIGHT_COS if not lean else abs(np.arccos(tilt) - lean) > UPRIGHT
            if (
                np.linalg.norm(after[a][:2] - state[a][:2]) > 0.01 + aside
                or abs(after[a][2] - self.nominal_z[name]) > 0.003
                or tipped
                or not np.isfinite(after).all()
            ):
                return None
        # the arm has moved while the objects fell: time and joints as before, and all at rest
        after[: 1 + ROBOT_DOF] = state[: 1 + ROBOT_DOF]
        after[1 + self.sim.model.nq :] = 0
        return after

    def random_layout(self, seed, jitter=JOINT_JITTER, spread=0.0, offsets=None):
        """A settled random layout (S,), set in the simulation, or None if the reset was bad (an
        object was thrown).

        jitter: standard deviation of the arm's joints in rad. spread: further uniform shift of the
        task's own objects, +- metres in x and y, each by itself; half as far on a fixture, not at
        all in one. What an object stands on moves along. offsets: {name: (dx, dy)} metres, added to
        that. seed: as of `reset`.
        """
        rng = np.random.default_rng([*seed, 20])  # a stream apart from that of the sampler
        self.reset(seed)
        movable = [n for n in (self.pick, self.place) if n in self.objects]
        # asked for another object, the task's own has to stand as it does when it is asked for
        own = [n for n in self.own_goals[0][1:2] if n in self.objects]
        state = self._settle(self.state(), dict.fromkeys([*movable, *own]))
        if state is None:
            return None
        pair = []
        if spread > 0:
            draws = {n: rng.uniform(-spread, spread, 2) for n in movable}
            room = {n: self._room_on_support(n) for n in movable}
            offsets = {n: room[n] * draws[n] + (offsets or {}).get(n, 0) for n in movable}
            carried = self._carried(movable)
            offsets.update({carried[n]: offsets[n] for n in carried})
            pair = [*carried, *carried.values()]
        if offsets:
            state = self.shift_objects(state, offsets, pair)
            if state is None:
                return None
        return self._with_start(state, rng, jitter)

    def _carried(self, names):
        """{an object: the object that it stands on, which moves along with it}."""
        supports = {n: self.stands_on(n)[1] for n in names}
        return {n: support for n, support in supports.items() if support in self.objects}

    def _room_on_support(self, name):
        """The share of a shift that an object makes: it may not fall off a fixture."""
        predicate, support = self.stands_on(name)
        if support is None or support in self.objects:
            return 1.0
        return 0.0 if predicate == "in" else 0.5

    def _with_start(self, state, rng, jitter):
        """Let the arm of a state (S,) start near its usual pose, and set the state -> the state.
        jitter: rad, see `random_layout`.
        """
        robot = self.env.robots[0].init_qpos
        state[1:8] = robot + rng.normal(0, jitter, 7)  # state[0] is the time
        state[8:10] = 0.0208, -0.0208  # half open, as in the benchmark's init states
        self.set_state(state)
        return state

    def placed_layout(self, seed, jitter, places):
        """A settled layout (S,) with objects at places {name: (x, y)} m, set in the simulation, or
        None for a bad one. seed, jitter: see `random_layout`; fixtures are placed by the seed.
        """
        rng = np.random.default_rng([*seed, 20])
        self.reset(seed)
        state = self.place_objects(self.state(), places)
        return None if state is None else self._with_start(state, rng, jitter)

    def place_objects(self, state, places):
        """Put objects of a state (S,) at places {name: (x, y)} m, at rest -> the state (S,), or
        None for a bad layout: one that `_settle` refuses, in which a placed object touches anything
        but the table, or in which the task would be done already. Raises UserError where the scene
        lacks one of them.
        """
        if missing := sorted(set(places) - set(self.objects)):
            raise UserError(
                f"{self.task.key}: {', '.join(missing)} is to be placed, and this scene holds only "
                f"{', '.join(self.objects)}; leave out --clean_scene, or choose another --layout"
            )
        state = np.array(state)
        for name, place in places.items():
            a = self._address(name)
            state[a][:3] = *place, self.nominal_z[name]
        state[1 + self.sim.model.nq :] = 0
        state = self._settle(state, places)
        if state is None:
            return None
        self.set_state(state)
        return None if self.success() or self._touching(places, fixtures=True) else state

    def common_shift(self, condition):
        """A settings.Condition's shift as offsets {name: (dx, dy)} of the task's two objects, or
        None for no shift. Raises UserError where one of them stands fixed."""
        if not (condition.dx or condition.dy):
            return None
        for name in (self.pick, self.place):
            if name not in self.objects:
                raise UserError(
                    f"positions: {self.task.key} has {name or 'a goal'} that cannot be shifted; "
                    "choose a task that places one movable object on another"
                )
        return {self.pick: (condition.dx, condition.dy), self.place: (condition.dx, condition.dy)}

    def stands_on(self, name):
        """What an object stands on or lies in, by its task's BDDL -> (predicate, name of another
        object, or of a fixture's region); (None, None) for the table or the floor.
        """
        for predicate, *names in self.env.env.parsed_problem["initial_state"]:
            if len(names) == 2 and names[0] == name:
                things = (*self.objects, *self.env.env.fixtures_dict)
                support = next((s for s in things if names[1].startswith(s)), "table")
                plain = support == "floor" or support.endswith("table")
                return (None, None) if plain else (predicate, names[1])
        return None, None

    def shift_objects(self, state, offsets, together=()):
        """Move objects of a state (S,) by {name: (dx, dy)} metres and let them settle -> the state
        (S,), or None for a bad layout. together: names of objects that may touch each other.

        It is bad where `_settle` says so, where one of them touches another movable object, and
        where the task would be done already. Raises RuntimeError if an object is not where it
        should be then.
        """
        state = np.array(state)
        wanted = {}
        for name, offset in offsets.items():
            # a slice of an array is a view: this writes into the state
            state[self._address(name)][:2] += offset
            wanted[name] = state[self._address(name)][:2].copy()
        state = self._settle(state, offsets)
        if state is None:
            return None
        self.set_state(state)
        for name, place in wanted.items():
            aside, _ = self.leaning.get(name, (0.0, 0.0))
            # `_settle` allows 1 cm
            if np.linalg.norm(self.position(name)[:2] - place) > 0.011 + aside:
                raise RuntimeError(
                    f"{name} was not shifted: it is at {self.position(name)[:2]}, "
                    f"{place} was asked for"
                )
        return None if self.success() or self._touching(offsets, together=together) else state

    def set_aside(self, name, place):
        """Set an object, as it stands, to a place (2,) m while an episode runs -> True, or False
        where it would touch anything but the table there, or the task would be done: then it stays.
        """
        before = self.sim.get_state()
        low, high = self.sim.model.get_joint_qpos_addr(f"{name}_joint0")
        velocity = slice(*self.sim.model.get_joint_qvel_addr(f"{name}_joint0"))
        self.sim.data.qpos[low : low + 2] = place
        self.sim.data.qvel[velocity] = 0
        self.sim.forward()
        if not self.success() and not self._touching([name], fixtures=True, robot=True):
            return True
        self.sim.set_state(before)
        self.sim.forward()
        return False

    def _touching(self, names, fixtures=False, robot=False, together=()):
        """True if one of the named objects touches another movable object, or, with `fixtures` and
        `robot`, one of these. Two of `together` may touch each other.
        """
        owner = {}  # {a geom's number: the object that it is of}; table and robot have none
        things = dict(self.env.env.objects_dict)
        if fixtures:
            things.update(self.env.env.fixtures_dict)
            things.pop("main_table", None)
        if robot:
            things.update(arm=self.robot.robot_model, gripper=self.robot.gripper)
        for name, obj in things.items():
            for geom in obj.contact_geoms:
                owner[self.sim.model.geom_name2id(geom)] = name
        for i in range(self.sim.data.ncon):
            contact = self.sim.data.contact[i]
            a, b = owner.get(contact.geom1), owner.get(contact.geom2)
            if a in together and b in together:
                continue
            if a != b and (a in names and b is not None or b in names and a is not None):
                return True
        return False

    def shifted_layout(self, state, seed, low=0.04, high=0.05, apart=0.04):
        """Move each of the task's objects by `low`..`high` metres in a random direction -> the
        state (S,), which is set in the simulation too.

        They move by at least `apart` metres relative to each other. Objects moved alike would keep
        the way from bowl to plate, and a replay that happens to catch the bowl's rim would carry it
        onto the plate without looking. What an object stands on moves with it, and one that lies
        in a fixture stays. Deterministic in `seed`. Bad layouts are drawn again; where all are bad,
        an object that stands on a fixture stays too. Raises UserError where the goal names no
        object, RuntimeError after 60 draws.
        """
        movable = [n for n in (self.pick, self.place) if n in self.objects]
        if not movable:
            raise UserError(
                f"{self.asked.key}: its goal names no object that could be shifted; choose another "
                "task or layout"
            )
        supports = {n: self.stands_on(n) for n in movable}
        on_fixtures = [n for n in movable if supports[n][1] and supports[n][1] not in self.objects]
        # a drawer leaves no room; on a stove or a cabinet there may be some
        free = [n for n in movable if n not in on_fixtures or supports[n][0] != "in"]
        carried = self._carried(movable)
        on_tables = [n for n in free if n not in on_fixtures]
        # the second only where it is another one
        for moved in dict.fromkeys([tuple(free), tuple(on_tables)]):
            found = self._shifted(state, seed, moved, carried, low, high, apart)
            if found is not None:
                return found
        raise RuntimeError(f"no valid shifted layout for seed {seed}")

    def _shifted(self, state, seed, movable, carried, low, high, apart):
        """The first good one of 60 draws of `shifted_layout`, or None. movable: objects that move;
        carried: {one of these: the object that moves along}.
        """
        rng = np.random.default_rng([seed, 35])
        for _ in range(60):
            angle, length = (
                rng.uniform(0, 2 * np.pi, len(movable)),
                rng.uniform(low, high, len(movable)),
            )
            offsets = {n: (r * np.cos(a), r * np.sin(a)) for n, a, r in zip(movable, angle, length)}
            if len(offsets) == 2 and np.linalg.norm(np.subtract(*offsets.values())) < apart:
                continue
            along = {carried[n]: offsets[n] for n in movable if n in carried}
            pair = [n for n in movable if n in carried] + list(along)
            shifted = self.shift_objects(state, {**offsets, **along}, pair)
            if shifted is not None:
                self.set_state(shifted)
                return shifted
        return None
