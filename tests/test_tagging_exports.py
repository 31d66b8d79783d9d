"""Exports of annotation tools, as the tools' own code writes them."""

import csv
import io
import json

import pytest
from PIL import Image

from timm_tresnet.tagging.annotations import ReadingOptions, read_annotations

NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def read(path, **reading):
    """Labels by file, names, and what was left out."""
    found = read_annotations(path, ReadingOptions(**reading))
    root = reading.get("images") or path.parent
    return {each.path.relative_to(root).as_posix(): each.labels for each in found.examples}, found.names, found.left_out


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def annotate(*results, number=1, cancelled=False):
    """An annotation as Label Studio exports it: of each result, its control, its type and its value."""
    return {
        "id": number,
        "completed_by": 1,
        "result": [
            {
                "value": value,
                "id": f"Dx_aB91IS{index}",
                "from_name": control,
                "to_name": "image",
                "type": kind,
                "origin": "manual",
            }
            for index, (control, kind, value) in enumerate(results)
        ],
        "was_cancelled": cancelled,
        "ground_truth": False,
        "created_at": f"2026-11-30T13:36:2{number}.747398Z",
        "updated_at": f"2026-11-30T13:37:2{number}.747398Z",
        "lead_time": 5.652,
        "prediction": {},
        "result_count": 0,
        "task": 1,
        "parent_prediction": None,
        "parent_annotation": None,
    }


def make_task(number, address, *annotations):
    """A task as Label Studio exports it, with the fields of `tests/custom/converter/data` of label-studio-sdk."""
    return {
        "id": number,
        "annotations": list(annotations),
        "file_upload": address.rpartition("/")[2],
        "drafts": [],
        "predictions": [],
        "data": {"image": address},
        "meta": {},
        "created_at": "2026-11-30T12:06:58.502299Z",
        "updated_at": "2026-11-30T13:37:03.168883Z",
        "inner_id": number,
        "total_annotations": len(annotations),
        "cancelled_annotations": 0,
        "total_predictions": 0,
        "comment_count": 0,
        "project": 1,
        "updated_by": 1,
        "comment_authors": [],
    }


def choose(*choices, control="choice"):
    return (control, "choices", {"choices": list(choices)})


TASKS = [
    make_task(1, "/data/upload/1/1b2c3d4e-a.jpg", annotate(choose("Cat"))),
    make_task(2, "/data/upload/1/5f6a7b8c-b.jpg", annotate(choose("Cat", "Two words"), number=2)),
    make_task(3, "/data/upload/1/9d0e1f2a-c.jpg"),
    make_task(
        4,
        "/data/upload/1/00112233-d.jpg",
        annotate(choose("Wrong"), number=3, cancelled=True),
        annotate(number=4),
        annotate(choose("Dog"), number=5),
    ),
]
LABELS = ({"a.jpg": ("Cat",), "b.jpg": ("Cat", "Two words"), "d.jpg": ("Dog",)}, ("Cat", "Dog", "Two words"))

# What `label_studio_sdk.converter.Converter` of label-studio-sdk 2.1.2 makes of TASKS, for the control
# <Choices name="choice" toName="image" choice="multiple">.
JSON_MIN = r"""[
{
  "image": "\/data\/upload\/1\/1b2c3d4e-a.jpg",
  "id": 1,
  "choice": "Cat",
  "annotator": 1,
  "annotation_id": 1,
  "created_at": "2026-11-30T13:36:21.747398Z",
  "updated_at": "2026-11-30T13:37:21.747398Z",
  "lead_time": 5.652
},
{
  "image": "\/data\/upload\/1\/5f6a7b8c-b.jpg",
  "id": 2,
  "choice": {
    "choices": [
      "Cat",
      "Two words"
    ]
  },
  "annotator": 1,
  "annotation_id": 2,
  "created_at": "2026-11-30T13:36:22.747398Z",
  "updated_at": "2026-11-30T13:37:22.747398Z",
  "lead_time": 5.652
},
{
  "image": "\/data\/upload\/1\/9d0e1f2a-c.jpg",
  "id": 3,
  "annotator": null,
  "annotation_id": null,
  "created_at": null,
  "updated_at": null,
  "lead_time": null
},
{
  "image": "\/data\/upload\/1\/00112233-d.jpg",
  "id": 4,
  "choice": "Dog",
  "annotator": 1,
  "annotation_id": 5,
  "created_at": "2026-11-30T13:36:25.747398Z",
  "updated_at": "2026-11-30T13:37:25.747398Z",
  "lead_time": 5.652
},
{
  "image": "\/data\/upload\/1\/00112233-d.jpg",
  "id": 4,
  "annotator": 1,
  "annotation_id": 4,
  "created_at": "2026-11-30T13:36:24.747398Z",
  "updated_at": "2026-11-30T13:37:24.747398Z",
  "lead_time": 5.652
}
]"""
CSV = """"annotation_id","annotator","choice","created_at","id","image","lead_time","updated_at"
1,"1","Cat","2026-11-30T13:36:21.747398Z",1,"/data/upload/1/1b2c3d4e-a.jpg",5.652,"2026-11-30T13:37:21.747398Z"
2,"1","{""choices"":[""Cat"",""Two words""]}","2026-11-30T13:36:22.747398Z",2,"/data/upload/1/5f6a7b8c-b.jpg",5.652,"2"
"","","","",3,"/data/upload/1/9d0e1f2a-c.jpg","",""
5,"1","Dog","2026-11-30T13:36:25.747398Z",4,"/data/upload/1/00112233-d.jpg",5.652,"2026-11-30T13:37:25.747398Z"
4,"1","","2026-11-30T13:36:24.747398Z",4,"/data/upload/1/00112233-d.jpg",5.652,"2026-11-30T13:37:24.747398Z"
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", TASKS),
        ("old.json", [{"completions" if key == "annotations" else key: task[key] for key in task} for task in TASKS]),
        ("min.json", JSON_MIN),
        ("x.csv", CSV),
        ("x.tsv", None),
    ],
    ids=["json", "completions", "json_min", "csv", "tsv"],
)
def test_choices_of_label_studio_are_labels_in_each_of_its_exports(name, content, folder):
    if content is None:
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="\t", quoting=csv.QUOTE_NONNUMERIC).writerows(csv.reader(CSV.splitlines()))
        content = text.getvalue()
    found, names, left_out = read(write(folder / name, content))
    assert (found, names) == LABELS
    assert left_out == {"tasks that nobody annotated": 1}


def test_boxes_and_taxonomies_of_label_studio_are_labels(folder):
    box = {"x": 37.2, "y": 70.7, "width": 4.2, "height": 4.7, "rotation": 0}
    boxes = [("label", "rectanglelabels", {**box, "rectanglelabels": names}) for names in (["car"], ["white", "car"])]
    polygon = ("label", "polygonlabels", {"points": [[0, 1]], "polygonlabels": ["van"]})
    brush = ("label", "brushlabels", {"rle": [1], "brushlabels": ["car"]})
    taxonomy = ("label", "taxonomy", {"taxonomy": [["car", "old"], ["van"]]})
    tasks = [
        make_task(1, "s3://bucket/photos/a.jpg", annotate(*boxes, ("label", "rectangle", box))),
        make_task(2, "https://x.org/b.jpg?size=1", annotate(polygon), annotate(brush, number=2)),
        make_task(3, "/data/local-files/?d=c.jpg", annotate(taxonomy)),
        make_task(4, "/data/local-files/?d=x%2Fd.jpg", annotate(choose(control="label"))),
    ]
    found, names, left_out = read(write(folder / "x.json", tasks), keep_empty=True)
    expected = {"a.jpg": ("car", "white"), "b.jpg": ("car", "van"), "c.jpg": ("car/old", "van"), "d.jpg": ()}
    assert (found, names) == (expected, ("car", "car/old", "van", "white"))
    assert not left_out
    regions = [
        {**box, "rectanglelabels": ["white", "car"], "original_width": 2800},
        {**box, "rectanglelabels": ["car"]},
    ]
    entry = {"id": 1, "annotator": 1, "annotation_id": 1, "lead_time": 2.0}
    flat = [{**entry, "image": "/data/upload/7/a.jpg", "label": regions}, {**entry, "image": "b.jpg"}]
    assert read(write(folder / "min.json", flat), keep_empty=True)[0] == {"a.jpg": ("car", "white"), "b.jpg": ()}


def test_of_several_controls_of_label_studio_one_is_named(folder):
    task = make_task(1, "a.jpg", annotate(choose("Cat", "Dog"), choose("sharp", control="quality")))
    flat = {"id": 1, "annotator": 1, "annotation_id": 1, "lead_time": 2.0, "image": "a.jpg", "quality": "sharp"}
    flat |= {"choice": {"choices": ["Cat", "Dog"]}, "width": 800}
    for name, content in (("x.json", task), ("min.json", flat)):
        path = write(folder / name, [content])
        with pytest.raises(
            ValueError, match="labels of several controls, choice, quality; name one of them with --col"
        ):
            read(path)
        assert read(path, column="choice")[:2] == ({"a.jpg": ("Cat", "Dog")}, ("Cat", "Dog"))
        assert read(path, column="quality")[1] == ("sharp",)
        with pytest.raises(ValueError, match="no labels of colour|needs \\[0\\].colour to hold labels"):
            read(path, column="colour")
    with pytest.raises(ValueError, match=r"needs \[0\].width to hold labels or choices, got 800"):
        read(folder / "min.json", column="width")


def test_images_of_label_studio_are_found_by_the_ends_of_their_addresses(folder):
    for name in ("1b2c3d4e-a.jpg", "sub/a.jpg", "naïve b.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    addresses = [
        "/data/upload/1/1b2c3d4e-a.jpg",
        "s3://bucket/x/sub/a.jpg",
        "/data/upload/1/00112233-na%C3%AFve%20b.jpg",
    ]
    tasks = [make_task(number, address, annotate(choose("x"))) for number, address in enumerate(addresses)]
    assert set(read(write(folder / "x.json", tasks))[0]) == {"1b2c3d4e-a.jpg", "sub/a.jpg", "naïve b.jpg"}
    (folder / "x").mkdir()
    with pytest.raises(ValueError, match="names 2 of 2 files that do not exist"):
        read(folder / "x.json", images=folder / "x")
    tasks = [make_task(number, f"s3://bucket/{part}/a.jpg", annotate(choose("x"))) for number, part in enumerate("yz")]
    with pytest.raises(ValueError, match='two images, "s3://bucket/y/a.jpg" and "s3://bucket/z/a.jpg", for one file'):
        read(write(folder / "x.json", tasks))
    tasks = [make_task(1, "/data/local-files/?d=../../etc/a.jpg", annotate(choose("x")))]
    with pytest.raises(ValueError, match="names 1 files outside"):
        read(write(folder / "x.json", tasks))
    tasks = [{**make_task(1, "", annotate(choose("x"))), "data": {"photo": "a.jpg"}}]
    with pytest.raises(ValueError, match="needs the addresses of images in file or .*, got photo; --file-column names"):
        read(write(folder / "x.json", tasks))
    assert read(folder / "x.json", file_column="photo")[0] == {"a.jpg": ("x",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "needs its content to be a list of objects, got .*, as Label Studio exports them"),
        (
            [{"file": "a.jpg"}],
            "no export of Label Studio's: neither tasks with annotations .* nor entries with annotation",
        ),
        ([{"annotations": []}], r"needs \[0\].data, which is missing"),
        ([{"data": {}, "annotations": [1]}], r"needs \[0\].annotations to be a list of objects"),
        (
            [{"data": {}, "annotations": [{"result": 3}]}],
            r"needs \[0\].annotations.result to be a list of objects or null",
        ),
        ([make_task(1, "a.jpg", annotate())], "has no labels"),
        ([make_task(1, "a.jpg")], "has no labels"),
    ],
    ids=["numbers", "another_list", "no_data", "ids", "result", "nothing_chosen", "nobody"],
)
def test_what_is_no_export_of_label_studio_is_refused(content, message, folder):
    with pytest.raises(ValueError, match=message):
        read(write(folder / "x.json", content))


# The form of datumaro's tests/assets/cvat_dataset/for_images, and <tag> as CVAT's dumper writes it
# (cvat/apps/dataset_manager/formats/cvat.py).
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>39</id>
      <name>photos</name>
      <size>4</size>
      <mode>annotation</mode>
      <labels>
        <label>
          <name>sea</name>
          <color>#0c81b5</color>
          <type>tag</type>
          <attributes>
            <attribute>
              <name>rough</name>
              <input_type>checkbox</input_type>
              <values>false true</values>
            </attribute>
          </attributes>
        </label>
        <label>
          <name>boat</name>
          <attributes></attributes>
        </label>
        <label>
          <name>skeleton</name>
          <type>skeleton</type>
          <svg>&lt;line x1="69.6"&gt;&lt;/line&gt;</svg>
        </label>
        <label>
          <name>1</name>
          <type>points</type>
          <parent>skeleton</parent>
        </label>
        <label>
          <name>never</name>
        </label>
      </labels>
    </task>
    <dumped>2026-11-30 01:38:22.055780+00:00</dumped>
  </meta>
  <image id="0" name="a.jpg" width="8" height="8">
    <tag label="sea" source="manual">
      <attribute name="rough">true</attribute>
    </tag>
    <tag label="boat" source="auto">
    </tag>
  </image>
  <image id="1" name="b.jpg" width="8" height="8">
    <box label="boat" source="manual" occluded="1" xtl="0.00" ytl="2.00" xbr="4.00" ybr="4.00" z_order="0">
    </box>
    <polygon label="boat" source="manual" occluded="0" points="1.00,2.00;3.00,4.00;6.00,5.00" z_order="0">
    </polygon>
    <polyline label="" points="1.0,2;3,4;5,6;7,8"/>
  </image>
  <image id="2" name="c.jpg" width="8" height="8">
  </image>
  <image id="3" name="frame_000003" width="8" height="8">
    <skeleton label="skeleton" source="manual" z_order="0">
      <points label="1" source="manual" outside="1" occluded="0" points="1,1">
      </points>
    </skeleton>
  </image>
</annotations>
"""


@pytest.mark.parametrize("inside", ["", "images"])
def test_tags_and_shapes_of_cvat_are_labels_in_its_order(inside, folder):
    (folder / "images").mkdir()
    for name, renamed in zip(NAMES, ("a.jpg", "b.jpg", "c.jpg", "frame_000003.png"), strict=True):
        (folder / name).rename(folder / inside / renamed)
    found, names, left_out = read(write(folder / "annotations.xml", CVAT), keep_empty=True)
    labels = [("boat", "sea"), ("boat",), (), ("skeleton",)]
    assert [found[file] for file in sorted(found)] == labels
    assert {file.rpartition("/")[0] for file in found} == {inside}
    assert names == ("sea", "boat", "skeleton", "never")
    assert read(folder / "annotations.xml")[2] == {"images without labels": 1}


def test_a_project_of_cvat_has_a_folder_for_each_subset(folder):
    for subset in ("Train", "Test"):
        (folder / "images" / subset).mkdir(parents=True)
        (folder / "a.jpg").replace(folder / "images" / subset / "a.jpg")
        Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    images = "".join(
        f'<image id="0" name="a.jpg" subset="{subset}" task_id="39"><tag label="{label}"></tag></image>'
        for subset, label in (("Train", "sea"), ("Test", "sky"))
    )
    labels = "<labels><label><name>sky</name></label></labels>"
    text = f"<annotations><meta><project>{labels}</project></meta>{images}</annotations>"
    found, names, _ = read(write(folder / "annotations.xml", text))
    assert found == {"images/Train/a.jpg": ("sea",), "images/Test/a.jpg": ("sky",)}
    assert names == ("sky", "sea")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "is not XML"),
        (
            "<annotation><filename>a.jpg</filename></annotation>",
            'holds <annotation> without images; export "CVAT for im',
        ),
        (
            '<annotations><track id="0" label="x"/></annotations>',
            'holds tracks of a video; export "CVAT for images 1.1"',
        ),
        ("<annotations><image id='0'/></annotations>", "needs a name of each image"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><annotations><image name="&a;"/></annotations>', "has a document type"),
        ('<annotations><image name="../a.jpg"><tag label="x"/></image></annotations>', "names 1 files outside"),
    ],
    ids=["text", "voc", "video", "nameless", "entities", "outside"],
)
def test_what_is_no_export_of_cvat_is_refused(text, message, folder):
    with pytest.raises(ValueError, match=message):
        read(write(folder / "x.xml", text))
