"""What is known of classes and pictures in words: nouns, kinds, places, and the slots of three ways to describe one.

Dataset names are not always words ("diningtable", "traffic_cone", COCO's "mouse"), so a class has a noun, synonyms, and
where it would be misread a gloss. A vocabulary lists the phrases of each slot; `models.generators.grammar` joins them.
Source: Syn4Seg spec §1.2 (photographs), §7 (thermal: no colour, no light; polarity, heat and range instead).
"""

from __future__ import annotations

from dataclasses import dataclass

INDOOR, OUTDOOR, ANYWHERE = "indoor", "outdoor", "anywhere"


@dataclass(frozen=True)
class ClassWords:
    """One class for prompts. name: as the dataset has it; noun: as a caption would; kinds: sub-types of it;
    states: what it may be doing; place: "indoor", "outdoor" or "anywhere"; gloss: what is meant, for a chat model."""

    name: str
    noun: str
    synonyms: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    place: str = ANYWHERE
    gloss: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """Slots in order, each with its phrases, and the template that they fill; {subject} is built from count, kind and
    noun. `indoor` names the scenes under a roof; an outdoor class does not go there, and neither does weather."""

    name: str
    template: str
    slots: dict[str, tuple[str, ...]]
    indoor: tuple[str, ...] = ()
    calm: str = ""  # the weather that also suits a roof


COUNTS = ("one", "two", "three", "several", "many")

ROOMS = ("in a living room", "in a kitchen", "in an office", "in a workshop", "in a train station hall",
         "in a warehouse", "in a classroom", "in a hotel lobby")
STREETS = ("on a city street", "on a country road", "in a parking lot", "at a crossroads", "on a bridge",
           "in a village square", "beside a canal", "on a university campus", "in a park", "on a farm",
           "in a forest clearing", "on a beach", "at a harbour", "in a suburb", "near a construction site",
           "on a mountain pass")

PHOTOGRAPH = Vocabulary(
    "photograph",
    "{lens} of {subject} {state} {scene}, {view}, {companion}{light}, {weather}, {scale}",
    {
        "count": COUNTS,
        "view": ("seen from the front", "seen from the side", "seen from behind", "seen from above",
                 "seen from a low angle", "seen at an angle", "seen through a gap", "seen from across the way"),
        "scene": STREETS + ROOMS,
        "light": ("in morning light", "at noon", "in low evening sun", "at dusk", "at night under lamps",
                  "in flat grey light", "in hard side light", "against the light", "in dim light", "in mixed light"),
        "weather": ("clear air", "light rain", "heavy rain", "fog", "snow", "haze", "wind and dust", "after a shower"),
        "scale": ("close up", "filling a third of the frame", "at middle distance", "far away",
                  "partly hidden", "cut by the edge of the frame"),
        "lens": ("a photo", "a wide-angle photo", "a telephoto picture", "a phone picture", "a film photo",
                 "a surveillance still"),
    },
    ROOMS, "clear air",
)
THERMAL = Vocabulary(
    "thermal",
    "{lens}, {polarity}, of {subject} {state} {scene}, {view}, {companion}{ambient}, {weather}, {scale}",
    {
        "count": COUNTS,
        "view": PHOTOGRAPH.slots["view"],
        "scene": STREETS + ROOMS,
        "polarity": ("white-hot", "black-hot"),
        "ambient": ("on a cold morning", "on a hot afternoon", "in the evening", "at midnight", "before dawn"),
        "weather": ("dry air", "rain with flat contrast", "fog", "snow on the ground", "humid air"),
        "scale": ("at short range", "at middle range", "at long range", "partly hidden", "at the edge of the frame"),
        "lens": ("a thermal infrared image", "a grayscale long-wave infrared image",
                 "a low-contrast infrared image at 640 by 480"),
    },
    ROOMS, "dry air",
)
TINTS = ("red", "yellow", "green", "cyan", "blue", "purple")
"""Hues, a sixth of the circle each, in their order from 0 on."""
DRAWN = Vocabulary(
    "drawn",
    "{subject} on {ground} ground",
    {"ground": tuple(f"{light} {tint}".strip() for tint in ("", *TINTS) for light in ("bright", "dark"))},
)
VOCABULARIES = {v.name: v for v in (PHOTOGRAPH, THERMAL, DRAWN)}

MOVING = ("parked", "standing still", "moving", "turning", "arriving", "leaving", "waiting", "in traffic",
          "broken down", "with its lights on")
LIVING = ("standing", "walking", "running", "sitting", "lying down", "turning away", "looking up", "resting",
          "in motion", "side by side with others")
THING = ("standing", "leaning", "placed in a row", "newly made", "worn and old", "in use", "left alone",
         "half covered", "being carried", "turned away")
STUFF = ("stretching into the distance", "filling the scene", "at the far side", "between other things",
         "seen in part", "running along one side", "wet", "dry", "empty", "busy")


def _words(name: str, noun: str = "", **more) -> ClassWords:
    noun = noun or name.replace("_", " ")
    return ClassWords(name, noun, **{"kinds": (noun,), "states": THING, **more})


_VEHICLE, _ANIMAL = {"states": MOVING, "place": OUTDOOR}, {"states": LIVING}
_STUFF, _ROOM = {"states": STUFF, "place": OUTDOOR}, {"place": INDOOR}
KNOWN = {
    words.name: words
    for words in (
        _words("aeroplane", synonyms=("airplane", "plane", "jet"), **_VEHICLE),
        _words("bicycle", synonyms=("bike",), kinds=("bicycle", "racing bicycle", "city bicycle", "cargo bicycle"),
               **_VEHICLE),
        _words("bike", "bicycle", synonyms=("bike",), **_VEHICLE),
        _words("bird", kinds=("bird", "small bird", "water bird", "bird of prey"), **_ANIMAL),
        _words("boat", synonyms=("ship",), kinds=("boat", "fishing boat", "sailing boat", "rowing boat"), **_VEHICLE),
        _words("bus", kinds=("bus", "city bus", "school bus", "double-decker bus"), **_VEHICLE),
        _words("car", kinds=("car", "small car", "estate car", "sports car", "old car", "taxi car"), **_VEHICLE),
        _words("truck", kinds=("truck", "delivery truck", "dump truck"), **_VEHICLE),
        _words("motorbike", synonyms=("motorcycle",), **_VEHICLE),
        _words("train", kinds=("train", "freight train", "commuter train"), **_VEHICLE),
        _words("cat", **_ANIMAL), _words("dog", kinds=("dog", "large dog", "small dog", "herding dog"), **_ANIMAL),
        _words("cow", synonyms=("cattle",), **_ANIMAL), _words("horse", **_ANIMAL), _words("sheep", **_ANIMAL),
        _words("animal", kinds=("animal", "farm animal", "wild animal"), **_ANIMAL),
        _words("person", synonyms=("man", "woman", "child", "people"), **_ANIMAL),
        _words("rider", synonyms=("cyclist", "motorcyclist"), states=MOVING, place=OUTDOOR),
        _words("diningtable", "dining table", synonyms=("table",), **_ROOM),
        _words("pottedplant", "potted plant", synonyms=("plant",)),
        _words("tvmonitor", "television", synonyms=("monitor", "screen", "tv"), **_ROOM),
        _words("tv", "television", synonyms=("tv", "screen"), **_ROOM),
        _words("sofa", synonyms=("couch",), **_ROOM), _words("monitor", synonyms=("screen",), **_ROOM),
        _words("mouse", "computer mouse", synonyms=("mouse",), gloss="the pointing device, not the animal", **_ROOM),
        _words("remote", "remote control", synonyms=("remote",), gloss="the hand-held control of a television"),
        _words("kite", "flying kite", synonyms=("kite",), gloss="the toy on a string, not the bird", place=OUTDOOR),
        _words("tie", "necktie", synonyms=("tie",), gloss="the garment"),
        _words("orange", "orange fruit", synonyms=("orange",), gloss="the fruit, not the colour"),
        _words("sports ball", synonyms=("ball",), gloss="any ball used in a game"),
        _words("curve", "kerb", synonyms=("curb", "curve"), gloss="the raised edge of a road", **_STUFF),
        _words("car_stop", "wheel stop", synonyms=("car stop",), gloss="the low block that ends a parking space",
               place=OUTDOOR),
        _words("color_cone", "traffic cone", synonyms=("cone",), place=OUTDOOR),
        _words("traffic_cone", "traffic cone", synonyms=("cone",), place=OUTDOOR),
        _words("bump", "speed bump", synonyms=("bump",), gloss="the ridge across a road", place=OUTDOOR),
        *(_words(name, **_STUFF) for name in ("road", "sky", "grass", "river", "sidewalk", "fence", "building",
                                              "tree", "pole", "guardrail")),
    )
}


def class_words(name: str) -> ClassWords:
    """What is known of a class; of an unknown one, its name."""
    return KNOWN.get(name, _words(name))


IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice",
             "sheep": "sheep", "cattle": "cattle", "people": "people", "knife": "knives", "bus": "buses"}


def plural(noun: str) -> str:
    """The plural of a noun, of its last word."""
    head, _, last = noun.rpartition(" ")
    if last in IRREGULAR:
        ending = IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        ending = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        ending = last[:-1] + "ies"
    else:
        ending = last + "s"
    return f"{head} {ending}".strip()


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"
