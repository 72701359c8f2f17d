// Reads a lazily loadable blob with the reference implementations.
//
// usage: estargz-verify BLOB TOC-DIGEST
//
// eStargz, or stargz-snapshotter's zstd:chunked: opens it, checks its TOC against a digest,
// reads every file by its chunks, checks every chunk, and prints "<sha256> <size> <path>"
// for each regular file, sorted by path.
//
// usage: estargz-verify BLOB MANIFEST-CHECKSUM MANIFEST-POSITION TARSPLIT-POSITION DIFF-ID
//
// containers/storage's zstd:chunked, see storage.go.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path"
	"sort"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/opencontainers/go-digest"
)

func main() {
	var err error
	switch len(os.Args) {
	case 3:
		err = verify(os.Args[1], digest.Digest(os.Args[2]))
	case 6:
		err = verifyStorage(os.Args[1], os.Args[2:])
	default:
		err = fmt.Errorf("wrong number of arguments, see main.go")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "estargz-verify:", err)
		os.Exit(1)
	}
}

func verify(blob string, toc digest.Digest) error {
	file, err := os.Open(blob)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	section := io.NewSectionReader(file, 0, info.Size())
	reader, err := estargz.Open(section, estargz.WithDecompressors(new(zstdchunked.Decompressor)))
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	verifier, err := reader.VerifyTOC(toc)
	if err != nil {
		return fmt.Errorf("verify TOC: %w", err)
	}
	root, ok := reader.Lookup("")
	if !ok {
		return fmt.Errorf("the TOC has no root")
	}
	var lines []string
	if err := walk(reader, verifier, root, "", &lines); err != nil {
		return err
	}
	sort.Strings(lines)
	for _, line := range lines {
		fmt.Println(line)
	}
	return nil
}

func walk(r *estargz.Reader, v estargz.TOCEntryVerifier, dir *estargz.TOCEntry, at string, lines *[]string) error {
	var failed error
	dir.ForeachChild(func(name string, child *estargz.TOCEntry) bool {
		full := path.Join(at, name)
		switch child.Type {
		case "dir":
			failed = walk(r, v, child, full, lines)
		case "reg", "hardlink":
			failed = read(r, v, full, lines)
		}
		return failed == nil
	})
	return failed
}

func read(r *estargz.Reader, v estargz.TOCEntryVerifier, name string, lines *[]string) error {
	entry, ok := r.Lookup(name)
	if !ok {
		return fmt.Errorf("%s: not found", name)
	}
	file, err := r.OpenFile(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	whole := sha256.New()
	for offset := int64(0); offset < entry.Size; {
		// Chunks are kept under the name of the file, not under those of its hard links.
		chunk, ok := r.ChunkEntryForOffset(entry.Name, offset)
		if !ok || chunk.ChunkOffset != offset || chunk.ChunkSize <= 0 {
			return fmt.Errorf("%s: no chunk at %d", name, offset)
		}
		check, err := v.Verifier(chunk)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		bytes := make([]byte, chunk.ChunkSize)
		if _, err := file.ReadAt(bytes, offset); err != nil && err != io.EOF {
			return fmt.Errorf("%s at %d: %w", name, offset, err)
		}
		_, _ = check.Write(bytes)
		if !check.Verified() {
			return fmt.Errorf("%s: the chunk at %d has another digest", name, offset)
		}
		_, _ = whole.Write(bytes)
		offset += chunk.ChunkSize
	}
	sum := digest.NewDigest(digest.SHA256, whole)
	if entry.Size > 0 && entry.Digest != sum.String() {
		return fmt.Errorf("%s: the file has another digest", name)
	}
	*lines = append(*lines, fmt.Sprintf("%s %d %s", sum.Encoded(), entry.Size, name))
	return nil
}
