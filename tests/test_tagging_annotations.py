import csv
import json

import pytest
from PIL import Image

from timm_tresnet.tagging.annotations import (
    ReadingOptions,
    list_notes,
    read_annotations,
    read_names,
    read_numbers,
    read_other_names,
)


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
    """Labels by file name relative to the folder, names, and what was left out; labels of images known in part."""
    found = read_annotations(path, ReadingOptions(**reading))
    if found.partial:
        return {each.path.name: (each.labels, each.absent) for each in found.examples}, found.names, found.left_out
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
    with pytest.raises(ValueError, match="x.csv has labels such as .* use --separator"):
        read(path)
    assert read(path, separator=";")[1] == (cell.strip('"'),)
    assert read(path, separator=cell.strip('"')[3])[1] == ("cat", "dog")


def test_rows_about_one_file_are_put_together(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat\n./a.jpg,dog\nb.jpg,cat\n")
    assert read(path)[0] == {"a.jpg": ("cat", "dog"), "b.jpg": ("cat",)}


def test_images_without_labels_are_counted_or_kept(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat\nb.jpg,\nc.jpg, ; \n")
    assert read(path) == ({"a.jpg": ("cat",)}, ("cat",), {"images without labels": 2})
    assert list_notes(read_annotations(path)) == [f"{path}: left out 2 images without labels"]
    assert read(path, keep_empty=True)[0] == {"a.jpg": ("cat",), "b.jpg": (), "c.jpg": ()}
    assert list_notes(read_annotations(path, ReadingOptions(keep_empty=True))) == []


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
    with pytest.raises(ValueError, match="not among the 2 known labels: emu; .*--skip-unknown"):
        read(path, names=("dog", "cat"))
    left_out = {"unknown labels": 1, "images without labels": 1}
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
    with pytest.raises(ValueError, match=r"needs annotations\[1\].image_id to be the id of an entry of images, got 8"):
        read(path)
    assert read(path, skip_unknown=True)[::2] == (
        {"a.jpg": ("cat",)},
        {"annotations of unknown images or categories": 2},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "x.json needs its content to be an object"),
        ("[]", "x.json has no labels"),
        ('{"images": []}', "x.json needs annotations, which is missing; COCO's annotations have"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', r"images\[0\].file_name, which is missing"),
        ("{", "x.json is not JSON"),
        (coco([(1, "a.jpg"), (1, "b.jpg")]), "two images or two categories with the same id"),
        (coco([(1, "a.jpg")], categories=[(1, "cat"), (2, "cat")]), "each label once, got more than once: cat"),
        (coco([(1, "a.jpg")], categories=[]), "has no labels"),
        (coco([(1, "a.jpg")], [(1, 1)], [(1, "\x1b[31m")]), "without control characters"),
        (coco([]), "has no usable images"),
    ],
    ids=["number", "list", "part", "entry", "damaged", "ids", "names", "no_labels", "control", "no_images"],
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
    with pytest.raises(ValueError, match=r"needs to contain metadata.jsonl, as .* of the Hub do, or a .txt"):
        read(folder)
    write(folder / "sub" / "metadata.jsonl", "")
    with pytest.raises(ValueError, match="there is one in sub"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "", "needs to be COCO's or Label Studio's .json, CVAT's .xml, a .csv"),
        ("x.csv", "", "needs a first line that names its columns"),
        ("x.csv", "a.jpg,cat\n", "needs a first line that names its columns, one of them file or file_name"),
        ("x.csv", "file,labels\na.jpg,cat,dog\n", "has 3 cells in line 2, and 2 in its first; put a cell"),
        ("x.csv", 'file,labels\na.jpg,"cat\n', "is not valid CSV"),
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
    with pytest.raises(ValueError, match="names.txt needs each label once, got more than once: dog"):
        read_names(write(folder / "names.txt", "dog\ndog\n"))


COMBINATIONS = ["haze primary", "primary", "agriculture clear primary", "clear primary", "clear", "haze"]


@pytest.mark.parametrize("form", ["x.csv", "metadata.jsonl"])
def test_labels_with_spaces_between_them_are_not_trained_as_combinations(folder, form):
    names = ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg", "a.jpg", "b.jpg"]
    if form == "x.csv":
        lines = ["image_name,tags", *(f"{name},{tags}" for name, tags in zip(names, COMBINATIONS, strict=True))]
    else:
        pairs = zip(names, COMBINATIONS, strict=True)
        lines = [json.dumps({"file_name": name, "tags": tags}) for name, tags in pairs]
    path = write(folder / form, "\n".join(lines))
    with pytest.raises(ValueError, match="has labels such as .*: use --separator ' ' if these are several labels"):
        read(path)
    labels, names, _ = read(path, separator=" ")
    assert names == ("agriculture", "clear", "haze", "primary")
    assert labels["c.jpg"] == ("agriculture", "clear", "primary")
    assert len(read(path, separator=";")[1]) == 6  # said to be one label each


@pytest.mark.parametrize(
    "cells",
    [["traffic light", "stop sign", "hot dog", "dog"], ["red bus;stop sign", "stop sign", "red bus", "red sign"]],
    ids=["no_fewer", "usual_separator"],
)
def test_labels_may_hold_spaces(folder, cells):
    names = ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg"]
    lines = [f"{name},{cell}" for name, cell in zip(names, cells, strict=True)]
    path = write(folder / "x.csv", "\n".join(["file,labels", *lines]))
    expected = {name.strip() for cell in cells for name in cell.split(";")}
    assert set(read(path)[1]) == expected


@pytest.mark.parametrize("separator", ["/", "+"])
def test_other_separators_are_asked_about_where_they_make_fewer_labels(folder, separator):
    names = ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg"]
    cells = [cell.replace(" ", separator) for cell in ("dog cat", "cat emu", "dog emu", "dog cat emu")]
    lines = [f"{name},{cell}" for name, cell in zip(names, cells, strict=True)]
    path = write(folder / "x.csv", "\n".join(["file,labels", *lines]))
    with pytest.raises(ValueError, match=f"use --separator '[{separator}]'"):
        read(path)
    assert read(path, separator=separator)[1] == ("cat", "dog", "emu")
    write(path, "file,labels\na.jpg,/m/01\nb.jpg,/m/02\n")
    assert read(path)[1] == ("/m/01", "/m/02")


@pytest.mark.parametrize(
    "cells",
    [
        ["1girl solo long_hair", "1girl blue_eyes hat", "dog"],  # of Danbooru
        [" ".join(f"tag{(number * step + number) % 40}" for step in range(12)) for number in range(1, 9)],
        ["dog cat emu", "cat emu ant", "dog ant bee", "bee fox"],
    ],
    ids=["underscores", "more_tags_than_images", "more_tags_than_combinations"],
)
@pytest.mark.parametrize("form", ["x.csv", "metadata.jsonl", "text"])
def test_combinations_of_more_labels_than_there_are_images_are_asked_about(folder, form, cells):
    names = [f"{number}.jpg" for number in range(len(cells))]
    pairs = list(zip(names, cells, strict=True))
    for name, cell in pairs:
        Image.new("RGB", (8, 8)).save(folder / name)
        if form == "text":
            write(folder / name.replace("jpg", "txt"), cell)
    if form == "x.csv":
        path = write(folder / form, "\n".join(["file,tags", *map(",".join, pairs)]))
    elif form == "metadata.jsonl":
        path = write(folder / form, "\n".join(json.dumps({"file_name": name, "tags": cell}) for name, cell in pairs))
    else:
        path = folder
    with pytest.raises(ValueError, match="use --separator ' ' if these are several labels"):
        read(path)
    assert set(read(path, separator=" ")[1]) == {tag for cell in cells for tag in cell.split()}
    assert len(read(path, separator="|")[1]) == len(cells)


def test_text_with_commas_in_metadata_is_asked_about_where_its_parts_recur(folder):
    path = write(folder / "metadata.jsonl", '{"file_name": "a.jpg", "labels": "cat, dog"}\n')
    assert read(path)[1] == ("cat, dog",)
    write(path, '{"file_name": "a.jpg", "labels": "cat, dog"}\n{"file_name": "b.jpg", "labels": "cat"}\n')
    with pytest.raises(ValueError, match="use --separator ','"):
        read(path)


@pytest.mark.parametrize(
    "cells",
    [
        ["Human face", "Human eye", "dog", "Human hand"] * 2,  # OpenImages
        ["Quercus alba", "Quercus rubra", "Acer rubrum", "Pica pica"],  # species, each once
        ["/m/01", "/m/02", "/m/03", "/m/04"],
        ["long hair;o_o", "^_^;red eyes", "long hair", "o_o"],
    ],
    ids=["words_in_common", "species", "paths", "emoticons"],
)
def test_labels_with_words_in_common_are_labels(folder, cells):
    names = ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg"] * 2
    path = write(folder / "x.csv", "\n".join(["file,labels", *map(",".join, zip(names, cells, strict=False))]))
    assert set(read(path)[1]) == {name for cell in cells for name in cell.split(";")}


def test_an_emoticon_is_no_reason_to_believe_in_semicolons(folder):
    cells = ["1girl solo ;)", "1girl hat", "hat solo", "1girl solo hat"]
    names = ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg"]
    lines = [f"{name},{cell}" for name, cell in zip(names, cells, strict=True)]
    with pytest.raises(ValueError, match="use --separator ' '"):
        read(write(folder / "x.csv", "\n".join(["file,tags", *lines])))


@pytest.mark.parametrize("header", ["image,labels", "ImageID,LabelName", "filepath,label", "Path,Tags"])
def test_columns_are_found_by_their_usual_names(folder, header):
    assert read(write(folder / "x.csv", f"{header}\na.jpg,cat;dog\n"))[1] == ("cat", "dog")


def test_the_column_of_files_can_be_named(folder):
    path = write(folder / "x.csv", "photo,labels\na.jpg,cat\n")
    with pytest.raises(ValueError, match="one of them file or file_name, got .*--file-column names another"):
        read(path)
    assert read(path, file_column="photo")[0] == {"a.jpg": ("cat",)}
    metadata = write(folder / "metadata.jsonl", '{"photo": "a.jpg", "labels": ["cat"]}')
    assert read(metadata, file_column="photo")[0] == {"a.jpg": ("cat",)}


def test_file_names_may_lack_their_suffix(folder):
    Image.new("RGB", (8, 8)).save(folder / "v1.5.png")
    path = write(folder / "x.csv", "ImageID,LabelName\na,cat\nv1.5,dog\na,dog\nsub/a,cat\n")
    labels = {"a.jpg": ("cat", "dog"), "v1.5.png": ("dog",), "sub/a.jpg": ("cat",)}
    assert read(path)[0] == labels
    with pytest.raises(ValueError, match=r"names 1 of 1 files that do not exist, .*nothing"):
        read(write(folder / "x.csv", "ImageID,LabelName\nnothing,cat\n"))


def test_tabs_and_lists_of_pandas_are_read(folder):
    path = write(folder / "x.tsv", "filepath\tlabel\na.jpg\t['it, is', 'dog']\nb.jpg\t[]\nc.jpg\t[3]\n")
    assert read(path)[:2] == ({"a.jpg": ("dog", "it, is"), "c.jpg": ("3",)}, ("3", "dog", "it, is"))
    with pytest.raises(ValueError, match="is not JSON"):
        read(write(folder / "x.tsv", "file\tlabel\na.jpg\t[open('x')]\n"))


@pytest.mark.parametrize(
    "name", [" lead", "-dash", "com,ma", 'qu"ote', "new\nline", "a\u2028b", "n\x85l", "v\x0bt", "e\u0301"]
)
@pytest.mark.parametrize("form", ["x.csv", "x.tsv", "text"])
def test_files_may_have_any_name(folder, name, form):
    Image.new("RGB", (8, 8)).save(folder / f"{name}.jpg")
    if form == "text":
        write(folder / f"{name}.txt", "cat")
        path = folder
    else:
        path = folder / form
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, delimiter="\t" if form == "x.tsv" else ",")
            rows.writerows([("labels", "file"), ("cat", f"{name}.jpg")])
    assert read(path)[0] == {f"{name}.jpg": ("cat",)}


def test_spaces_around_the_name_of_a_file_are_the_tables_unless_it_has_them(folder):
    path = write(folder / "x.csv", "labels, file\ncat, a.jpg \ndog, sub/a.jpg\n")
    assert read(path)[0] == {"a.jpg": ("cat",), "sub/a.jpg": ("dog",)}
    with pytest.raises(ValueError, match="names 1 files outside"):
        read(write(path, "labels, file\ncat, ../a.jpg\n"))


def test_rows_with_and_without_a_suffix_are_about_one_file(folder):
    Image.new("RGB", (8, 8)).save(folder / "D.JPG")
    for names in (("a", "a.jpg"), ("a.jpg", "a")):
        lines = "".join(f"{name},{label}\n" for name, label in zip((*names, "D"), ("cat", "dog", "emu"), strict=True))
        assert read(write(folder / "x.csv", f"ImageID,LabelName\n{lines}"))[0] == {
            "a.jpg": ("cat", "dog"),
            "D.JPG": ("emu",),
        }
        lines = "".join(
            f"{name},{label},{label == 'cat':d}\n" for name, label in zip(names, ("cat", "dog"), strict=True)
        )
        path = write(folder / "x.csv", f"ImageID,LabelName,Confidence\n{lines}")
        assert read(path)[0] == {"a.jpg": (("cat",), ("dog",))}


def test_empty_rows_of_spreadsheets_are_no_rows(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat\n,\n  \n\n,\n")
    assert read(path) == ({"a.jpg": ("cat",)}, ("cat",), {})


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_of_columns_are_named(folder, separator):
    path = write(folder / "x.csv", f"file{separator}labels\na.jpg{separator}cat,dog\n")
    with pytest.raises(ValueError, match=r"needs commas between its columns, or tabs if it is a \.tsv, got .file"):
        read(path)


def test_cells_are_as_long_as_all_labels_of_a_large_set(folder):
    names = [f"label {number}, of a large set" for number in range(11221)]
    path = write(folder / "x.csv", 'file,labels\na.jpg,"' + ";".join(names) + '"\n')
    assert len(read(path)[0]["a.jpg"]) == len(names)


def test_columns_of_labels_that_are_given_are_all_used_or_unknown(folder):
    path = write(folder / "x.csv", "file,cat,dog\na.jpg,1,0\nb.jpg,2,1\n")
    with pytest.raises(
        ValueError, match="needs 1, 0, -1 or nothing in each cell of a label's column, got others in cat"
    ):
        read(path, names=("cat", "dog"))
    names = ("cat", "emu")  # there is no column of the second
    found = read(write(path, "file,cat,dog\na.jpg,1,0\nb.jpg,0,1\n"), names=names)[0]
    assert found == {"a.jpg": (("cat",), ()), "b.jpg": ((), ("cat",))}
    found = read(write(path, "file,cat,dog\na.jpg,1,-1\nb.jpg,-1,1\n"), names=names)[0]
    assert found == {"a.jpg": (("cat",), ()), "b.jpg": ((), ("cat",))}
    path = write(folder / "x.csv", "file,/m/1,dog\na.jpg,1,0\nb.jpg,0,1\n")
    found = read(path, names=("cat", "dog"), other_names={"/m/1": "cat"})[0]
    assert found == {"a.jpg": ("cat",), "b.jpg": ("dog",)}
    found = read(path, names=("/m/1", "dog"), other_names={"/m/1": "dog", "dog": "/m/1"})[0]
    assert found == {"a.jpg": ("dog",), "b.jpg": ("/m/1",)}


def test_the_index_of_pandas_is_no_label_and_empty_cells_have_many_names(folder):
    path = write(folder / "x.csv", ",file,cat,dog\n0,a.jpg,1,NA\n1,b.jpg,<NA>,1\n")
    assert read(path)[:2] == ({"a.jpg": ("cat",), "b.jpg": ("dog",)}, ("cat", "dog"))


def test_rows_that_say_different_things_of_a_file_leave_it_unknown(folder):
    path = write(folder / "x.csv", "file,cat,dog\na.jpg,1,0\na.jpg,0,0\nb.jpg,0,1\nb.jpg,0,1\n")
    found = read_annotations(path)
    assert [(each.labels, each.absent) for each in found.examples] == [((), ("dog",)), (("dog",), None)]
    assert found.left_out == {"labels both present and absent": 1}
    path = write(folder / "x.csv", "file,cat,dog\na.jpg,1,\na.jpg,,1\n")  # a row a label
    assert read(path)[0] == {"a.jpg": ("cat", "dog")}


def test_labels_that_look_like_one_are_named(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,Red fox;sea\nb.jpg,red  fox;sea;red_fox\n")
    assert read(path)[1] == ("Red fox", "red  fox", "red_fox", "sea")
    (note,) = list_notes(read_annotations(path))
    assert note.startswith(f"{path}: labels that differ in case, spaces or underscores alone are different labels: ")
    assert "labels: Red fox, red  fox, red_fox; merge them" in note


def test_a_column_for_each_label_is_read_in_order(folder):
    path = write(folder / "x.csv", "filename, Dog, Cat,size\na.jpg,1,0,8\nb.jpg,0,1.0,9\nc.jpg,0,0,9\n")
    left_out = {"images without labels": 1, "columns with values other than 0 and 1 (size)": 1}
    assert read(path) == ({"a.jpg": ("Dog",), "b.jpg": ("Cat",)}, ("Dog", "Cat"), left_out)
    assert read(path, names=("Cat",), keep_empty=True)[0]["a.jpg"] == ()


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1,-1", "-1,1"], {"a.jpg": ("x",), "b.jpg": ("y",)}),  # CelebA
        (["1,", ",1"], {"a.jpg": ("x",), "b.jpg": ("y",)}),
        (["1,", "0,1"], {"a.jpg": (("x",), ()), "b.jpg": (("y",), ("x",))}),  # CheXpert
        (["1,-1", "0,1"], {"a.jpg": (("x",), ()), "b.jpg": (("y",), ("x",))}),
        (["1.0,-1.0", "0.0,1.0"], {"a.jpg": (("x",), ()), "b.jpg": (("y",), ("x",))}),
        (["True,nan", "False,TRUE"], {"a.jpg": (("x",), ()), "b.jpg": (("y",), ("x",))}),
    ],
    ids=["minus_one_for_no", "nothing_for_no", "nothing_for_unknown", "minus_one_for_unknown", "numbers", "words"],
)
def test_what_is_neither_0_nor_1_is_unknown_if_some_are_0(folder, cells, expected):
    lines = [f"{name},{cell}" for name, cell in zip(("a.jpg", "b.jpg"), cells, strict=True)]
    assert read(write(folder / "x.csv", "\n".join(["file,x,y", *lines])))[0] == expected


def test_labels_that_were_looked_for_in_vain_are_known_and_others_are_not(folder):
    lines = ["ImageID,Source,LabelName,Confidence", "a,v,/m/1,1", "a,v,/m/2,0", "b,v,/m/3,0", "c,v,/m/1,1"]
    path = write(folder / "x.csv", "\n".join(lines))
    images = {"a.jpg": (("/m/1",), ("/m/2",)), "b.jpg": ((), ("/m/3",)), "c.jpg": (("/m/1",), ())}
    assert read(path)[:2] == (images, ("/m/1", "/m/2", "/m/3"))
    write(path, "\n".join([*lines, "a,v,/m/1,0"]))  # two people, two answers
    images["a.jpg"] = ((), ("/m/2",))
    assert read(path)[::2] == (images, {"labels both present and absent": 1})
    with pytest.raises(ValueError, match='needs each confidence to be 0 or 1, got "0.7"'):
        read(write(path, "\n".join([*lines, "b,m,/m/1,0.7"])))
    with_all = "ImageID,LabelName,Confidence\na,/m/1,1\nb,/m/2,1\n"
    assert read(write(path, with_all))[0] == {"a.jpg": ("/m/1",), "b.jpg": ("/m/2",)}  # nobody said no to anything


def test_lvis_says_what_an_image_was_searched_for(folder):
    content = json.loads(coco([(1, "x"), (2, "x")], [(1, 3)], [(3, "cat"), (18, "dog"), (20, "emu")]))
    for image, negative, name in zip(content["images"], ([18], []), ("sub/a.jpg", "a.jpg"), strict=True):
        del image["file_name"]
        image |= {"coco_url": f"http://images.cocodataset.org/{name}", "neg_category_ids": negative}
    content["images"][1]["coco_url"] = "http://images.cocodataset.org/sub/a.jpg"
    path = write(folder / "x.json", json.dumps(content))
    assert read(path)[0] == {"a.jpg": (("cat",), ("dog",))}
    content["images"][0]["neg_category_ids"] = [4]
    with pytest.raises(ValueError, match=r"needs images\[0\].neg_category_ids to be ids of categories, got 4"):
        read(write(path, json.dumps(content)))


CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: labels
    {kind}:
      class_label:
        names:
          '0': dog
          '1': cat
          '2': emu
---
# Pets
"""


@pytest.mark.parametrize("kind", ["dtype", "sequence", "list"])
@pytest.mark.parametrize("place", [".", ".."], ids=["beside", "above"])
def test_numbers_of_a_hub_data_set_have_the_names_of_its_card(folder, kind, place):
    path = write(folder / "sub" / "metadata.jsonl", '{"file_name": "a.jpg", "labels": [1, 0]}')
    write(path.parent / place / "README.md", CARD.replace("{kind}", kind))
    assert read(path)[:2] == ({"a.jpg": ("cat", "dog")}, ("dog", "cat", "emu"))
    path.unlink()
    path = write(folder / "sub" / "metadata.csv", "file_name,labels\na.jpg,1\n")
    assert read(folder / "sub")[:2] == ({"a.jpg": ("cat",)}, ("dog", "cat", "emu"))
    with pytest.raises(ValueError, match="has class numbers beyond the 3 names: 3"):
        read(write(path, "file_name,labels\na.jpg,3\n"))


@pytest.mark.parametrize("card", ["---\n: :\n  - [\n---\n", "---\ndataset_info: 3\n---\n", "# No data\n"])
def test_a_card_that_does_not_help_leaves_numbers_or_says_why(folder, card):
    write(folder / "README.md", card)
    write(folder / "metadata.jsonl", '{"file_name": "a.jpg", "labels": [10, 9]}')
    if ": :" in card:
        with pytest.raises(ValueError, match="has a dataset card, .*README.md, that cannot be read"):
            read(folder)
    else:
        assert read(folder)[1] == ("9", "10")  # by their value


def test_numbers_are_indices_of_given_names(folder):
    path = write(folder / "x.csv", "Id,Target\na,1 0\nb,2\n")
    options = {"file_column": "Id", "column": "Target", "separator": " "}
    assert read(path, **options, names=("dog", "cat", "emu"))[:2] == (
        {"a.jpg": ("cat", "dog"), "b.jpg": ("emu",)},
        ("dog", "cat", "emu"),
    )
    assert read(path, **options, names=("2", "1", "0"))[0]["b.jpg"] == ("2",)  # these are names themselves


def test_text_beside_images_holds_their_labels(folder):
    write(folder / "a.txt", "cat, red eyes\ndog\n")
    write(folder / "sub" / "a.txt", "dog")
    write(folder / "b.txt", "")
    labels = {"a.jpg": ("cat", "dog", "red eyes"), "sub/a.jpg": ("dog",)}
    left_out = {"images without a .txt": 1, "images without labels": 1}
    assert read(folder) == (labels, ("cat", "dog", "red eyes"), left_out)
    for name, text in (("a", "cat dog"), ("sub/a", "dog"), ("b", "cat"), ("c", "dog emu"), ("d", "cat emu")):
        write(folder / f"{name}.txt", text)
    Image.new("RGB", (8, 8)).save(folder / "d.jpg")
    with pytest.raises(ValueError, match="use --separator ' '"):
        read(folder)
    assert read(folder, separator=" ")[1] == ("cat", "dog", "emu")


def test_boxes_beside_images_are_their_labels_by_number(folder):
    write(folder / "a.txt", "1 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1\n")
    write(folder / "b.txt", "1 0.5 0.5 0.1 0.1 0.2 0.2\n")
    assert read(folder, names=("dog", "cat"))[0] == {"a.jpg": ("cat", "dog"), "b.jpg": ("cat",)}


@pytest.mark.parametrize(
    ("image", "annotation", "first"),
    [
        # Label Studio's converter: ids from 0, file names behind the folder of its archive
        ({"width": 8, "height": 8}, {"segmentation": [], "bbox": [0.0, 1.5, 2, 3], "ignore": 0, "iscrowd": 0}, 0),
        # CVAT: ids from 1, empty addresses, attributes
        (
            {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0},
            {"segmentation": [[0, 0, 1, 1, 2, 2]], "attributes": {"occluded": False, "rotation": 0.0}},
            1,
        ),
    ],
    ids=["label_studio", "cvat"],
)
def test_coco_as_annotation_tools_export_it_is_read(image, annotation, first, folder):
    content = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"contributor": "", "year": 2026},
        "images": [{"id": first + number, "file_name": f"{name}.jpg", **image} for number, name in enumerate("ab")],
        "categories": [
            {"id": first + number, "name": name, "supercategory": ""} for number, name in enumerate(("cat", "dog"))
        ],
        "annotations": [
            {"id": number, "image_id": first + of_image, "category_id": first + category, "area": 4, **annotation}
            for number, (of_image, category) in enumerate(((0, 1), (0, 1), (0, 0), (1, 1)))
        ],
    }
    path = write(folder / "x.json", json.dumps(content))
    assert read(path)[:2] == ({"a.jpg": ("cat", "dog"), "b.jpg": ("dog",)}, ("cat", "dog"))


def test_class_folders_are_those_that_timms_scripts_measure(folder):
    for name in ("train/cat/a.jpg", "val/cat/b.jpg", "val/dog/c.jpg", "val/dog/d.gif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    found, names, left_out = read(folder, class_folders=True)
    assert found == {"val/cat/b.jpg": ("cat",), "val/dog/c.jpg": ("dog",)}
    assert names == ("cat", "dog")
    assert left_out == {".gif files, which timm's reader skips": 1}


def test_class_folders_are_one_label_an_image_where_they_are_asked_for(folder):
    (folder / "sub10").mkdir()
    (folder / "sub9" / "deep").mkdir(parents=True)
    for name in ("sub10/a.jpg", "sub9/deep/a.jpg", "sub9/b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    labels = {"sub/a.jpg": ("sub",), "sub10/a.jpg": ("sub10",), "sub9/deep/a.jpg": ("deep",), "sub9/b.jpg": ("sub9",)}
    found, names, left_out = read(folder, class_folders=True)
    assert found == labels
    assert names == ("deep", "sub", "sub9", "sub10")  # as timm sorts them
    assert left_out == {"images outside class folders": 3}
    with pytest.raises(ValueError, match="needs to contain metadata.jsonl"):
        read(folder)


def test_labels_can_be_called_by_other_names(folder):
    path = write(folder / "x.csv", "ImageID,LabelName,Confidence\na,/m/1,1\na,/m/2,0\nb,/m/3,1\n")
    names = read_other_names(write(folder / "names.csv", 'LabelName,DisplayName\n/m/1,"red, round"\n/m/2,Dog\n'))
    images = {"a.jpg": (("red, round",), ("Dog",)), "b.jpg": (("/m/3",), ())}
    assert read(path, other_names=names)[:2] == (images, ("red, round", "Dog", "/m/3"))
    with pytest.raises(ValueError, match="names.csv needs two columns, got 3 cells in line 1"):
        read_other_names(write(folder / "names.csv", "a,b,c\n"))


def test_numbers_come_one_a_label(folder):
    path = write(folder / "n.csv", 'Classes,avg_pred\ncat,0.5\n"red, round",2\nemu,0\n')
    assert read_numbers(path, ("red, round", "cat")) == {"red, round": 2, "cat": 0.5}
    assert read_numbers(write(path, "cat,3\n"), ("cat",)) == {"cat": 3}
    for text, message in (
        ("cat,1\n", "n.csv has no number for 1 of 2 labels: dog"),
        ("cat,1\ndog,many\n", 'needs a number from 0 on in line 2, got "many"'),
        ("cat,1\ndog,-1\n", "needs a number from 0 on in line 2"),
        ("cat,1\ndog,nan\n", "needs a number from 0 on in line 2"),
        ("cat\n", "needs two columns, got 1 cells in line 1"),
        ('cat,"1', "n.csv is not valid CSV"),
    ):
        with pytest.raises(ValueError, match=message):
            read_numbers(write(path, text), ("cat", "dog"))


def make_outside(tmp_path):
    """A folder of annotations beside a file that is not its own; names that lead there."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "data" / "inner.png").symlink_to("a.png")
    (tmp_path / "data" / "up").symlink_to("..")
    (tmp_path / "data-beside").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data-beside" / "b.png")
    return [str(tmp_path / "private.png"), "../private.png", "x/../../private.png", "link.png", "up/private.png"] + [
        "../data-beside/b.png",
        str(tmp_path / "data" / "a.png"),
    ]


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_images_outside_the_folder_are_taken_with_an_option_alone(suffix, number, tmp_path):
    name = make_outside(tmp_path)[number]
    path = tmp_path / "data" / f"labels.{suffix}"
    path.write_text(
        {
            "csv": f"file,labels\n{name},cat\n",
            "jsonl": json.dumps({"file_name": name, "labels": ["cat"]}),
            "json": json.dumps(
                {
                    "images": [{"id": 1, "file_name": name}],
                    "categories": [{"id": 1, "name": "cat"}],
                    "annotations": [{"image_id": 1, "category_id": 1}],
                }
            ),
        }[suffix]
    )
    with pytest.raises(ValueError, match=r"names 1 files outside \S+, by absolute paths, .. or links: .*--outside"):
        read_annotations(path)
    if not name.startswith("x/"):  # there is no x
        (example,) = read_annotations(path, ReadingOptions(outside=True)).examples
        assert example.path.exists()


def test_links_within_the_folder_and_a_folder_that_is_a_link_are_no_matter(tmp_path):
    make_outside(tmp_path)
    (tmp_path / "data" / "labels.csv").write_text("file,labels\ninner.png,cat\n./a.png,cat\n")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "data")
    assert len(read_annotations(tmp_path / "elsewhere" / "labels.csv").examples) == 2


LINE = '{"file_name": "a.jpg", "labels": '
WHOLE = {  # file, text, options, and all that is said, with {path} and {folder}
    "annotation_without_category": (
        "x.json",
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}], "categories": []}',
        {},
        "{path} needs annotations[0].category_id, which is missing; COCO's annotations have images, annotations and "
        "categories",
    ),
    "category_without_name": (
        "x.json",
        '{"images": [], "annotations": [], "categories": [{"id": 1}]}',
        {},
        "{path} needs categories[0].name, which is missing; COCO's annotations have images, annotations and categories",
    ),
    "image_without_id": (
        "x.json",
        '{"images": [{"file_name": "a.jpg"}], "annotations": [], "categories": []}',
        {},
        "{path} needs images[0].id, which is missing; COCO's annotations have images, annotations and categories",
    ),
    "annotation_of_nothing": (
        "x.json",
        coco([(1, "a.jpg")], [(1, 5)]),
        {},
        "{path} needs annotations[0].category_id to be the id of an entry of categories, got 5; leave such annotations "
        "out with --skip-unknown",
    ),
    "ids_twice": (
        "x.json",
        coco([(1, "a.jpg"), (1, "b.jpg")]),
        {},
        "{path} has two images or two categories with the same id",
    ),
    "cells": (
        "x.csv",
        "file,labels\na.jpg,cat,dog\n",
        {},
        "{path} has 3 cells in line 2, and 2 in its first; put a cell that holds commas in quotes, as in "
        'photo.jpg,"red, round;cat"',
    ),
    "no_file": (
        "x.csv",
        "photo,labels\na.jpg,cat\n",
        {},
        '{path} needs a first line that names its columns, one of them file or file_name, got "photo,labels"; '
        "--file-column names another",
    ),
    "no_labels": (
        "x.csv",
        "file,animal\na.jpg,cat\n",
        {},
        "{path} needs a first line that names its columns, one of them labels or tags or label, or a column of 0 and 1 "
        'for each label, got "file,animal"; --column names another',
    ),
    "wanted_column": (
        "x.csv",
        "file,animal\na.jpg,cat\n",
        {"column": "b"},
        '{path} needs a first line that names its columns, one of them b, got "file,animal"; --column names another',
    ),
    "confidence": (
        "x.csv",
        "file,label,confidence\na.jpg,cat,0.7\n",
        {},
        '{path} needs each confidence to be 0 or 1, got "0.7"; leave out unverified labels, or rename the column',
    ),
    "separator": (
        "x.csv",
        "file,labels\na.jpg,cat|dog\n",
        {},
        "{path} has labels such as \"cat|dog\": use --separator '|' if these are several labels, or "
        "--separator ';' if this is one label",
    ),
    "list": (
        "x.csv",
        'file,labels\na.jpg,"[{}]"\n',
        {},
        "{path} needs a cell that begins with [ to be a label or a list of labels, each a whole number or "
        "text, got a list "
        "of 1",
    ),
    "metadata_column": (
        "metadata.jsonl",
        '{"file_name": "a.jpg", "animal": 1}',
        {},
        "{path} needs a column labels or tags or label, got animal, file_name; name the label column with --column "
        "(line 1)",
    ),
    "metadata_label": (
        "metadata.jsonl",
        f"{LINE}[1.5]}}",
        {},
        "{path} needs labels to be a label or a list of labels, each a whole number or text, got [1.5] (line 1)",
    ),
    "metadata_file": ("metadata.jsonl", "\n{}", {}, "{path} needs file_name, which is missing (line 2)"),
    "unknown_label": (
        "x.csv",
        "file,labels\na.jpg,cat;emu\n",
        {"names": ("cat",)},
        "{path} has labels that are not among the 1 known labels: emu; add them, or leave them out with --skip-unknown",
    ),
    "too_large_a_number": (
        "x.csv",
        "file,labels\na.jpg,1;0\n",
        {"names": ("cat",)},
        "{path} has class numbers beyond the 1 names: 1",
    ),
    "missing_file": (
        "x.csv",
        "file,labels\na.jpg,cat\nd.jpg,cat\n",
        {},
        "{path} names 1 of 2 files that do not exist, {folder}/d.jpg; say where they are with --images, or "
        "leave them out "
        "with --skip-missing",
    ),
    "nothing_left": (
        "x.csv",
        "file,labels\na.jpg,\nb.jpg,emu\n",
        {"names": ("cat",), "skip_unknown": True},
        "{path} has no usable images; left out 1 unknown labels, 2 images without labels",
    ),
    "outside": (
        "x.csv",
        "file,labels\n../a.jpg,cat\n",
        {},
        "{path} names 1 files outside {folder}, by absolute paths, .. or links: ../a.jpg; if you trust the "
        "annotations, allow these files with --outside",
    ),
    "other_form": (
        "x.yaml",
        "",
        {},
        "{path} needs to be COCO's or Label Studio's .json, CVAT's .xml, a .csv of file and labels, or a folder with "
        "metadata.jsonl or with a .txt beside each image",
    ),
    "folder_without_labels": (
        ".",
        None,
        {},
        "{path} needs to contain metadata.jsonl, as dataset folders of the Hub do, or a .txt with labels "
        "beside each image",
    ),
}


@pytest.mark.parametrize(("name", "text", "options", "message"), WHOLE.values(), ids=WHOLE)
def test_faults_are_reported_in_whole_sentences(folder, name, text, options, message):
    path = folder if text is None else write(folder / name, text)
    with pytest.raises(ValueError, match=r"\A") as caught:
        read(path, **options)
    assert str(caught.value) == message.format(path=path, folder=folder)


def test_omissions_are_reported_in_a_whole_sentence(folder):
    path = write(folder / "x.csv", "file,labels\na.jpg,cat\nb.jpg,emu\n")
    found = read_annotations(path, ReadingOptions(names=("cat",), skip_unknown=True))
    assert list_notes(found) == [f"{path}: left out 1 unknown labels, 1 images without labels"]


def test_an_image_that_was_searched_for_nothing_may_say_so_or_not(folder):
    content = json.loads(coco([(1, "a.jpg"), (2, "b.jpg")], [(1, 3), (2, 3)]))
    content["images"][0]["neg_category_ids"] = [18]
    path = write(folder / "x.json", json.dumps(content))
    assert read(path)[0] == {"a.jpg": (("cat",), ("dog",)), "b.jpg": (("cat",), ())}
