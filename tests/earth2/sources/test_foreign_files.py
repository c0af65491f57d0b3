# SPDX-License-Identifier: Apache-2.0
"""Files of another kind given to the sources: each is named as what it is, with the mend."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pytest

from ddo_modulus.errors import InputError

pytest.importorskip("earth2studio")
pytest.importorskip("pdbufr")
pytest.importorskip("pyodc")

from ddo_modulus.earth2.sources import BufrSource, CdsSource, OdbSource  # noqa: E402

NOON = np.array(["2019-03-27T12:00"], "datetime64[ns]")
HTML = b"<!DOCTYPE html><html><body>log in</body></html>"


def zipped(name, content=b"text"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return file.getvalue()


# The content of a file, and what it is in the message.
FOREIGN = {
    "zip": (zipped("x.bufr"), "a zip archive; unpack it"),
    "Excel": (zipped("xl/workbook.xml"), "a workbook of Excel; save the sheet as CSV"),
    "old Excel": (b"\xd0\xcf\x11\xe0" + bytes(60), "a workbook of Excel; save the sheet as CSV"),
    "gzip": (gzip.compress(b"BUFR"), "compressed by gzip; unpack it with gunzip"),
    "bzip2": (bz2.compress(b"BUFR"), "compressed by bzip2; unpack it with bunzip2"),
    "xz": (lzma.compress(b"BUFR"), "compressed by xz; unpack it with unxz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(60), "compressed by zstd; unpack it with unzstd"),
    "tar": (tarred(), "a tar archive; unpack it"),
    "page": (HTML, "a web page, which a server sent instead of the data"),
    "page after a mark": (b"\xef\xbb\xbf\n" + HTML, "a web page"),
    "XML": (b'<?xml version="1.0"?><Error/>', "a web page"),
    "JSON": (b'{"message": "no access"}', "JSON, perhaps the error message of a server; read it"),
    "HTTP": (b"HTTP/1.1 200 OK\r\n\r\nBUFR", "the answer of a web server, headers included"),
    "empty": (b"", "empty; download or write it again"),
    "GRIB": (b"GRIB" + bytes(60), "a GRIB file of fields; fields are read by `ddo prepare`"),
    "netCDF": (b"CDF\x01" + bytes(60), "a netCDF file; fields are read by `ddo prepare`"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "a netCDF or HDF5 file; fields are read by"),
    "parquet": (b"PAR1" + bytes(60) + b"PAR1", "a parquet table; give it as a table"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "PDF": (b"%PDF-1.4\n" + bytes(60), "a PDF document; give "),
}
OTHER_REPORTS = {
    "BUFR": (b"BUFR" + bytes(60), "a BUFR file of reports; read it with BufrSource"),
    "ODB": (b"\xff\xffODA" + bytes(60), "an ODB file of reports; read it with OdbSource"),
}
# The sources, the names of their files, and the kinds that they read.
SOURCES = {
    "BUFR": (BufrSource, "x.bufr", ("BUFR",)),
    "ODB": (OdbSource, "x.odb", ("ODB",)),
    "CDS": (CdsSource, "x.csv", ("zip", "gzip", "bzip2", "xz")),
}
CASES = [
    pytest.param(source, name, *case, id=f"{kind} to {label}")
    for label, (source, name, own) in SOURCES.items()
    for kind, case in (FOREIGN | OTHER_REPORTS).items()
    if kind not in own
]
ADVICE = ("Try", "engine=", "on_bad_lines", "pandas", "Expected", "Assertion", "encoding=")


def refused(source, path, words, capfd):
    with pytest.raises(InputError) as caught:
        source(path)(NOON, "t2m")
    message = str(caught.value)
    assert str(path) in message and words in message
    assert "\n" not in message and not any(text in message for text in ADVICE)
    assert capfd.readouterr().err == "", "a library printed a line of its own"
    return message


@pytest.mark.parametrize(("source", "name", "content", "words"), CASES)
def test_it_is_named_as_what_it_is(tmp_path, capfd, source, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(source, path, f"not {'an' if name == 'x.odb' else 'a'} ", capfd)
    assert f"but {words}" in message
    assert "damaged" not in message


@pytest.mark.parametrize("source", [BufrSource, OdbSource, CdsSource])
def test_a_file_of_r_is_named_by_its_suffix(tmp_path, capfd, source):
    path = tmp_path / "x.rda"
    path.write_bytes(gzip.compress(b"RDX3"))
    refused(source, path, "a file of R", capfd)


UNKNOWN = {
    "text to BUFR": (BufrSource, b"some text", "not a BUFR file (it starts with b'some tex')"),
    "text to ODB": (OdbSource, b"some text", "not an ODB-2 file (it starts with b'some ')"),
    "text to CDS": (CdsSource, b"some text\n", "no column report_timestamp"),
    "a folder to BUFR": (BufrSource, None, "no such file"),
    "a folder to ODB": (OdbSource, None, "no such file"),
    "a folder to CDS": (CdsSource, None, "no such file"),
    "latin-1 to CDS": (CdsSource, "höhe,breite\n1,2\n".encode("latin-1"), "not text in UTF-8"),
    "uneven rows to CDS": (CdsSource, b"a,b\n1,2\n1,2,3,4\n", "different numbers of cells"),
    "a comment to CDS": (CdsSource, b"# nothing else\n", "the table is empty"),
    "zip without a table to CDS": (CdsSource, zipped("x.nc"), "no CSV table in it"),
    "zip with an empty table to CDS": (CdsSource, zipped("x.csv", b""), "the table is empty"),
}


@pytest.mark.parametrize(("source", "content", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_none_of_these_is_not_called_damaged(tmp_path, capfd, source, content, words):
    path = tmp_path / "x"
    path.mkdir() if content is None else path.write_bytes(content)
    assert "damaged" not in refused(source, path, words, capfd)


CUT = {
    "BUFR": (BufrSource, b"BUFR\x00\x01\x00\x04" + bytes(60)),
    "ODB within its mark": (OdbSource, b"\xff\xffODA"),
    "ODB within its header": (OdbSource, b"\xff\xffODA\x00\x00\x00\x01"),
    "zip to CDS": (CdsSource, zipped("x.csv")[:-20]),
    "gzip to CDS": (CdsSource, gzip.compress(b"a,b\n1,2\n")[:-6]),
    "xz to CDS": (CdsSource, lzma.compress(b"a,b\n1,2\n")[:-6]),
}


@pytest.mark.parametrize(("source", "content"), CUT.values(), ids=CUT)
def test_what_is_cut_short_is_called_so(tmp_path, capfd, source, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    refused(source, path, "cut short", capfd)


def test_a_compressed_table_of_the_store_is_read(tmp_path):
    header = "report_timestamp,latitude,longitude,observed_variable,observation_value,units"
    table = f"{header}\n2019-03-27 12:00:00+00:00,52,-1,air_temperature,281.5,K\n".encode()
    for number, content in enumerate((table, *(f(table) for f in PACKED))):
        path = tmp_path / f"{number}"
        path.write_bytes(content)
        rows = CdsSource(path)(NOON, "t2m")
        assert rows["observation"].tolist() == pytest.approx([281.5])


PACKED = (gzip.compress, bz2.compress, lzma.compress, lambda table: zipped("x.csv", table))
