import json

import pytest
from PIL import Image

from timm_tresnet.tagging.annotations import Reading, describe_left_out, read_annotations, read_names


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg", "sub/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def read(path, **reading):
    """Labels by file name relative to the folder, names, and what was left out."""
    found = read_annotations(path, Reading(**reading))
    root = path if path.is_dir() else path.parent
    return {each.path.relative_to(root).as_posix(): each.labels for each in found.examples}, found.names, found.left_out


def coco(images=(), annotations=(), categories=((18, "dog"), (3, "cat"))):
    return json.dumps(
        {
            "info": {},
            "licenses": [],
            "images": [{"id": key, "file_name": name, "width": 8, "height": 8} for key, name in images],
            "annotations": [
                {"id": index, "image_id": image, "category_id": category, "iscrowd": index % 2, "area": 1e9, "bbox": []}
                for index, (image, category) in enumerate(annotations)
            ],
            "categories": [{"id": key, "name": name, "supercategory": "animal"} for key, name in categories],
        }
    )


def test_csv_has_several_labels_a_cell_in_any_order_of_columns(folder):
    path = write(folder / "x.csv", "labels,author,file\ncat;dog,me,a.jpg\n dog ;, you ,sub/a.jpg\n")
    assert read(path) == ({"a.jpg": ("cat", "dog"), "sub/a.jpg": ("dog",)}, ("cat", "dog"), {})


def test_csv_labels_can_have_commas_quotes_and_any_script(folder):
    path = write(folder / "x.csv", '\ufefffile,labels\r\na.jpg,"red, round;it ""is"";猫"\r\nb.jpg,ärger\r\n')
    labels = {"a.jpg": ('it "is"', "red, round", "猫"), "b.jpg": ("ärger",)}
    assert read(path) == (labels, ('it "is"', "red, round", "ärger", "猫"), {})


def test_csv_cells_can_be_json_lists_for_labels_with_any_character(folder):
    path = write(folder / "x.csv", 'file,labels\na.jpg,"[""a;b"", ""c""]"\nb.jpg,[]\n')
    assert read(path, keep_empty=True) == ({"a.jpg": ("a;b", "c"), "b.jpg": ()}, ("a;b", "c"), {})


@pytest.mark.parametrize("cell", ['"cat,dog"', "cat|dog"])
def test_csv_without_the_separator_is_not_guessed_about(folder, cell):
    path = write(folder / "x.csv", f"file,labels\na.jpg,{cell}\n")
    with pytest.raises(ValueError, match="x.csv has labels such as .* say --separator"):
        read(path)
    assert read(path, separator=";")[1] == (cell.strip('"'),)
    assert read(path, separator=cell.strip('"')[3])[1] == ("cat", "dog")


def test_rows_about_one_file_are_put_together(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat\n./a.jpg,dog\nb.jpg,cat\n")
    assert read(path)[0] == {"a.jpg": ("cat", "dog"), "b.jpg": ("cat",)}


def test_images_without_labels_are_counted_or_kept(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat\nb.jpg,\nc.jpg, ; \n")
    assert read(path) == ({"a.jpg": ("cat",)}, ("cat",), {"images without labels": 2})
    assert "left out 2 images without labels" in describe_left_out(read_annotations(path))
    assert read(path, keep_empty=True)[0] == {"a.jpg": ("cat",), "b.jpg": (), "c.jpg": ()}
    assert describe_left_out(read_annotations(path, Reading(keep_empty=True))) is None


def test_missing_files_are_an_error_or_counted(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat\nsub/b.jpg,cat\nsub,dog\n")
    with pytest.raises(ValueError, match=r"names 2 of 3 files that do not .*sub/b.jpg.* --images.* --skip-missing"):
        read(path)
    assert read(path, skip_missing=True)[::2] == ({"a.jpg": ("cat",)}, {"files that do not exist": 2})


def test_file_names_are_relative_to_the_images(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat\n")
    assert read(path, images=folder / "sub")[0] == {"sub/a.jpg": ("cat",)}


def test_unknown_labels_are_an_error_or_left_out(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat;emu\nb.jpg,emu\n")
    with pytest.raises(ValueError, match="not among the 2 known ones: emu; .*--skip-unknown"):
        read(path, names=("dog", "cat"))
    left_out = {"labels that are unknown": 1, "images without labels": 1}
    assert read(path, names=("dog", "cat"), skip_unknown=True) == ({"a.jpg": ("cat",)}, ("dog", "cat"), left_out)


def test_coco_labels_are_its_categories_by_ascending_id_whatever_the_gaps(folder):
    images = [(7, "a.jpg"), (9, "sub/a.jpg"), (11, "b.jpg")]
    path = write(folder / "x.json", coco(images, [(7, 18), (7, 18), (7, 3), (9, 18)]))
    labels = {"a.jpg": ("cat", "dog"), "sub/a.jpg": ("dog",)}
    assert read(path) == (labels, ("cat", "dog"), {"images without labels": 1})


def test_coco_is_numbered_as_pycocotools_numbers_it(folder, capsys):
    pycocotools = pytest.importorskip("pycocotools.coco", reason="install pycocotools to compare with it")
    images = [(7, "a.jpg"), (9, "sub/a.jpg")]
    path = write(folder / "x.json", coco(images, [(7, 18), (9, 3), (9, 90)], [(90, "emu"), (3, "cat"), (18, "dog")]))
    theirs = pycocotools.COCO(path)
    names = [theirs.cats[key]["name"] for key in sorted(theirs.getCatIds())]
    found, ours, _ = read(path)
    assert list(ours) == names
    for key, name in images:
        expected = {theirs.cats[entry["category_id"]]["name"] for entry in theirs.imgToAnns[key]}
        assert set(found[name]) == expected


def test_coco_annotations_of_nothing_are_an_error_or_counted(folder):
    path = write(folder / "x.json", coco([(7, "a.jpg")], [(7, 3), (8, 3), (7, 4)]))
    with pytest.raises(ValueError, match=r"needs annotations\[1\].image_id to be the id of one of the others, got 8"):
        read(path)
    assert read(path, skip_unknown=True)[::2] == (
        {"a.jpg": ("cat",)},
        {"annotations of unknown images or categories": 2},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "x.json needs its content to be an object"),
        ('{"images": []}', "x.json needs annotations, which is missing; COCO's annotations have"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', r"images\[0\].file_name, which is missing"),
        ("{", "x.json is not JSON"),
        (coco([(1, "a.jpg"), (1, "b.jpg")]), "an id twice"),
        (coco([(1, "a.jpg")], categories=[(1, "cat"), (2, "cat")]), "labels that differ, got twice: cat"),
        (coco([(1, "a.jpg")], categories=[]), "has no labels"),
        (coco([(1, "a.jpg")], [(1, 1)], [(1, "\x1b[31m")]), "without control characters"),
        (coco([]), "has no images"),
    ],
    ids=["list", "part", "entry", "damaged", "ids", "names", "no_labels", "control", "no_images"],
)
def test_coco_that_is_none_is_refused_in_a_sentence(folder, text, message):
    path = write(folder / "x.json", text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_dataset_folder_of_the_hub_has_labels_among_other_columns(folder):
    lines = [
        {"file_name": "a.jpg", "tags": ["cat", "dog"], "width": 8, "caption": "two"},
        {"file_name": "b.jpg", "tags": "cat", "width": 8},
        {"file_name": "sub/a.jpg", "tags": [3, "dog"]},
        {"file_name": "c.jpg", "tags": None},
    ]
    path = write(folder / "metadata.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    expected = ({"a.jpg": ("cat", "dog"), "b.jpg": ("cat",), "sub/a.jpg": ("3", "dog")}, ("3", "cat", "dog"))
    assert read(folder)[:2] == read(path)[:2] == expected


def test_a_column_can_be_named(folder):
    path = write(folder / "x.csv", "file_name,labels,objects\na.jpg,1,cat;dog\n")
    assert read(path, column="objects")[1] == ("cat", "dog")
    with pytest.raises(ValueError, match="one of them things, got"):
        read(path, column="things")
    metadata = write(folder / "metadata.jsonl", '{"file_name": "a.jpg", "objects": ["cat"]}')
    assert read(metadata, column="objects")[1] == ("cat",)
    with pytest.raises(ValueError, match=r"needs a column labels or tags or label, got .*--column \(line 1\)"):
        read(metadata)


def test_a_folder_without_metadata_says_where_some_is(folder):
    with pytest.raises(ValueError, match=r"needs to hold a metadata.jsonl, as dataset folders of the Hub do$"):
        read(folder)
    write(folder / "sub" / "metadata.jsonl", "")
    with pytest.raises(ValueError, match="there is one in sub"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "", "needs to be COCO's .json, a .csv"),
        ("x.csv", "", "needs a first line that names its columns"),
        ("x.csv", "a.jpg,cat\n", "needs a first line that names its columns, one of them file or file_name"),
        ("x.csv", "file,labels\na.jpg,cat,dog\n", "has 3 cells in line 2, and 2 in its first; put a cell"),
        ("x.csv", 'file,labels\na.jpg,"cat\n', "is no CSV"),
        ("x.csv", "file,labels\na.jpg,[1\n", "is not JSON"),
        ("x.csv", "file,labels\n", "has no labels"),
        ("x.jsonl", '{"file_name": 3}', r"file_name to be text .*\(line 1\)"),
        ("x.jsonl", '{"file_name": "a", "labels": {"x": 1}}', r"needs labels to be a label or a list of labels"),
        ("x.jsonl", "nonsense", r"x.jsonl is not JSON.*\(line 1\)"),
    ],
)
def test_what_is_no_annotation_is_refused_in_a_sentence(folder, name, text, message):
    path = write(folder / name, text)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value).strip()


def test_text_that_is_not_utf_8_is_refused(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,ä\n", encoding="latin-1")
    with pytest.raises(ValueError, match="x.csv needs to be text in UTF-8"):
        read(path)


def test_names_come_one_a_line(folder):
    assert read_names(write(folder / "names.txt", "dog\n\n cat \n")) == ("dog", "cat")
    with pytest.raises(ValueError, match="names.txt needs labels that differ, got twice: dog"):
        read_names(write(folder / "names.txt", "dog\ndog\n"))
