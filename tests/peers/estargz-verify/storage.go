// containers/storage's zstd:chunked, read as podman reads it: the TOC by the annotations, the
// files by their ranges, the tar by tar-split. Podman 5 refuses a layer of which any of this fails:
//   - the compressed TOC has the digest of the annotation, the tar-split that of the TOC;
//   - TOC and tar-split have the same entries, and each says what Go's tar reader makes of the header;
//   - the files put together by tar-split have the diff_id.

package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/archive/tar"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

type entry struct {
	Type, Name, LinkName            string
	Mode, Size                      int64
	UID, GID                        int
	ModTime, AccessTime, ChangeTime *time.Time
	DevMajor, DevMinor              int64
	Xattrs                          map[string]string
	Digest                          string
	Offset, EndOffset               int64
	ChunkSize, ChunkOffset          int64
	ChunkDigest                     string
}

type document struct {
	Version        int
	Entries        []entry
	TarSplitDigest digest.Digest
}

var kinds = map[byte]string{
	tar.TypeReg: "reg", tar.TypeLink: "hardlink", tar.TypeChar: "char", tar.TypeBlock: "block",
	tar.TypeDir: "dir", tar.TypeFifo: "fifo", tar.TypeSymlink: "symlink",
}

func verifyStorage(name string, args []string) error {
	blob, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	decoder, err := zstd.NewReader(nil)
	if err != nil {
		return err
	}
	text, err := section(decoder, blob, args[1], digest.Digest(args[0]))
	if err != nil {
		return fmt.Errorf("TOC: %w", err)
	}
	var toc document
	if err := json.Unmarshal(text, &toc); err != nil {
		return err
	}
	split, err := section(decoder, blob, args[2], toc.TarSplitDigest)
	if err != nil {
		return fmt.Errorf("tar-split: %w", err)
	}
	if err := same(toc, split); err != nil {
		return err
	}
	files, err := contents(decoder, blob, toc)
	if err != nil {
		return err
	}
	digester := digest.Canonical.Digester()
	unpacker := storage.NewJSONUnpacker(bytes.NewReader(split))
	if err := asm.WriteOutputTarStream(files, unpacker, digester.Hash()); err != nil {
		return fmt.Errorf("put together: %w", err)
	}
	if got := digester.Digest().String(); got != args[3] {
		return fmt.Errorf("put together, the tar is %s and not %s", got, args[3])
	}
	fmt.Printf("%d entries, %d files\n", len(toc.Entries), len(files))
	return nil
}

// section is what is at "offset:length:decoded length[:kind]" of the blob, decoded.
func section(decoder *zstd.Decoder, blob []byte, position string, want digest.Digest) ([]byte, error) {
	var offset, length, decoded int
	if _, err := fmt.Sscanf(position, "%d:%d:%d", &offset, &length, &decoded); err != nil {
		return nil, err
	}
	frame := blob[offset : offset+length]
	if got := digest.FromBytes(frame); got != want {
		return nil, fmt.Errorf("has digest %s and not %s", got, want)
	}
	text, err := decoder.DecodeAll(frame, nil)
	if err == nil && len(text) != decoded {
		err = fmt.Errorf("%d bytes instead of %d", len(text), decoded)
	}
	return text, err
}

// same compares the TOC with the headers in the tar-split.
func same(toc document, split []byte) error {
	pending := map[string]entry{}
	for _, entry := range toc.Entries {
		if entry.Type == "chunk" {
			continue
		}
		if _, twice := pending[entry.Name]; twice {
			return fmt.Errorf("%s is in the TOC twice", entry.Name)
		}
		pending[entry.Name] = entry
	}
	unpacker := storage.NewJSONUnpacker(bytes.NewReader(split))
	err := asm.IterateHeaders(unpacker, func(header *tar.Header) error {
		entry, ok := pending[header.Name]
		if !ok {
			return fmt.Errorf("%s is not in the TOC", header.Name)
		}
		delete(pending, header.Name)
		return compare(entry, header)
	})
	if err == nil && len(pending) > 0 {
		err = fmt.Errorf("%d entries of the TOC are not in the tar", len(pending))
	}
	return err
}

func compare(entry entry, header *tar.Header) error {
	xattrs := map[string]string{}
	for key, value := range header.PAXRecords {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			xattrs[name] = base64.StdEncoding.EncodeToString([]byte(value))
		}
	}
	switch {
	case entry.Type != kinds[header.Typeflag], entry.LinkName != header.Linkname, entry.Mode != header.Mode,
		entry.Size != header.Size, entry.UID != header.Uid, entry.GID != header.Gid,
		entry.DevMajor != header.Devmajor, entry.DevMinor != header.Devminor,
		!maps.Equal(entry.Xattrs, xattrs) && len(entry.Xattrs)+len(xattrs) > 0,
		!sameTime(entry.ModTime, header.ModTime), !sameTime(entry.AccessTime, header.AccessTime),
		!sameTime(entry.ChangeTime, header.ChangeTime):
		return fmt.Errorf("TOC and header differ:\n%+v\n%+v", entry, header)
	}
	return nil
}

// sameTime takes no time, Go's zero time and 1970 as one.
func sameTime(have *time.Time, want time.Time) bool {
	zero := func(t time.Time) bool { return t.IsZero() || t.Equal(time.Unix(0, 0)) }
	if have == nil || zero(*have) {
		return zero(want)
	}
	return have.Equal(want)
}

// memory is the files of a layer by name.
type memory map[string][]byte

func (m memory) Get(name string) (io.ReadCloser, error) {
	file, ok := m[path.Clean(name)]
	if !ok {
		return nil, fmt.Errorf("%s: no such file", name)
	}
	return io.NopCloser(bytes.NewReader(file)), nil
}

// contents reads every file by the ranges of its chunks, and checks digests of files and chunks.
func contents(decoder *zstd.Decoder, blob []byte, toc document) (memory, error) {
	files := memory{}
	for at := 0; at < len(toc.Entries); at++ {
		first := toc.Entries[at]
		if first.Type != "reg" || first.Size == 0 {
			continue
		}
		chunks := []entry{first}
		for at+1 < len(toc.Entries) && toc.Entries[at+1].Type == "chunk" {
			at++
			chunks = append(chunks, toc.Entries[at])
		}
		var file []byte
		for number, chunk := range chunks {
			end := first.EndOffset
			if number+1 < len(chunks) {
				end = chunks[number+1].Offset
			}
			piece, err := decoder.DecodeAll(blob[chunk.Offset:end], nil)
			if err != nil {
				return nil, fmt.Errorf("%s at %d: %w", first.Name, chunk.ChunkOffset, err)
			}
			if len(chunks) > 1 && (int64(len(piece)) != chunk.ChunkSize || chunk.ChunkOffset != int64(len(file)) ||
				chunk.ChunkDigest != digest.FromBytes(piece).String()) {
				return nil, fmt.Errorf("%s: the chunk at %d is another", first.Name, chunk.ChunkOffset)
			}
			file = append(file, piece...)
		}
		if int64(len(file)) != first.Size || first.Digest != digest.FromBytes(file).String() {
			return nil, fmt.Errorf("%s: size or digest differ", first.Name)
		}
		files[path.Clean(first.Name)] = file
	}
	return files, nil
}
