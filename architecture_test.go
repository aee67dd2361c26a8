package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// goPackage is what `go list -json` says of a package, as far as it matters here.
type goPackage struct {
	ImportPath, Dir                              string
	GoFiles, CgoFiles, TestGoFiles, XTestGoFiles []string
	Imports, TestImports, XTestImports           []string
}

// path is the package's place in this module: "" for the root.
func (p goPackage) path() string { return inModule(p.ImportPath) }

func (p goPackage) files() []string {
	return slices.Concat(p.GoFiles, p.CgoFiles, p.TestGoFiles, p.XTestGoFiles)
}

// ownImports lists the packages of this module that p or its tests import, by
// their place in it.
func (p goPackage) ownImports() []string {
	var own []string
	for _, path := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
		if path != p.ImportPath && (path == module || strings.HasPrefix(path, module+"/")) {
			own = append(own, inModule(path))
		}
	}
	slices.Sort(own)
	return slices.Compact(own)
}

const module = "sluice"

func inModule(importPath string) string {
	return strings.TrimPrefix(strings.TrimPrefix(importPath, module), "/")
}

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json", "./...")
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	require.NoError(t, err)
	var packages []goPackage
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else {
			require.NoError(t, err)
		}
		packages = append(packages, p)
	}
}

// services gives tests a broker and a database.
const services = "e2e/services"

// group is the one thing that platform packages share: without it, stores and
// brokers that write to a database would each have a group commit of their own.
const group = "platform/group"

// mayImport is the import rule: arrows point down only, modules know each other
// by their contract alone, and platform packages stand side by side, on group.
func mayImport(from, to string) bool {
	in := func(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }
	switch {
	case to == services:
		return in(from, "platform") || in(from, "modules") || in(from, "e2e") // their tests
	case from == "":
		return to != "e2e"
	case from == "config":
		return to != "modules/contract" && (in(to, "modules") || in(to, "platform"))
	case in(from, "platform"):
		return to == group && from != group
	case from == "modules/contract":
		return false
	case in(from, "modules"):
		return to == "modules/contract" || in(to, "platform")
	case from == "e2e":
		return to == "e2e/backend" || to == "e2e/load"
	case from == "e2e/load":
		return to == "e2e/backend"
	case from == "e2e/load/experiment":
		return to == "e2e/load" // what the load generator says; all else is a process
	default:
		return false
	}
}

func TestImportsPointDownOnly(t *testing.T) {
	for _, p := range listPackages(t) {
		for _, imported := range p.ownImports() {
			require.True(t, mayImport(p.path(), imported), "%s must not import %s", p.ImportPath, imported)
		}
	}
}

func TestOnlyTestsUseServices(t *testing.T) {
	for _, p := range listPackages(t) {
		require.NotContains(t, p.Imports, module+"/"+services, p.ImportPath)
	}
}

func TestTheImportRuleRefuses(t *testing.T) {
	for _, arrow := range [][2]string{
		{"modules/intake", "modules/dispatch"},
		{"modules/dispatch", "config"},
		{"modules/contract", "platform/pubsub"},
		{"platform/pubsub", "platform/middleware"},
		{"platform/group", "platform/database"},
		{"modules/contract", "platform/group"},
		{"platform/middleware", "modules/contract"},
		{"config", "e2e/backend"},
		{"config", "e2e/services"},
		{"e2e/backend", "modules/contract"},
		{"e2e", "config"},
		{"e2e/load/experiment", "e2e/backend"},
		{"somewhere/new", "platform/pubsub"},
	} {
		require.False(t, mayImport(arrow[0], arrow[1]), "%s to %s", arrow[0], arrow[1])
	}
}

func TestEveryPackageHasAPackageComment(t *testing.T) {
	for _, p := range listPackages(t) {
		documented := slices.ContainsFunc(p.files(), func(name string) bool {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
			require.NoError(t, err)
			return packageComment(file) != ""
		})
		require.True(t, documented, "%s has no package comment", p.ImportPath)
	}
}

func packageComment(file *ast.File) string { return strings.TrimSpace(file.Doc.Text()) }

// What a document can point at: [text](target), and `path/of/a/file.go` or
// `path/of/a/directory/`.
var (
	codeBlock = regexp.MustCompile("(?ms)^ *```.*?^ *```")
	link      = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	codePath  = regexp.MustCompile("`((?:[A-Za-z0-9_.-]+/)+(?:[A-Za-z0-9_-]+\\.(?:go|md|mod|sql|ya?ml|json|sh))?)`")
)

// deadPointers lists what a document in dir names and files does not have.
func deadPointers(files fs.FS, dir, text string) []string {
	exists := func(path string) bool {
		_, err := fs.Stat(files, filepath.ToSlash(filepath.Clean(path)))
		return err == nil
	}
	var dead []string
	text = codeBlock.ReplaceAllString(text, "")
	for _, match := range link.FindAllStringSubmatch(text, -1) {
		target, _, _ := strings.Cut(match[1], "#")
		if target != "" && !strings.Contains(target, ":") && !exists(filepath.Join(dir, target)) {
			dead = append(dead, match[1])
		}
	}
	for _, match := range codePath.FindAllStringSubmatch(text, -1) {
		first, rest, _ := strings.Cut(match[1], "/")
		// A single directory is often one that the program makes (`data/`), and a
		// dot in the first name is another module's (`example.org/x/y.go`).
		if rest == "" || strings.Contains(strings.TrimPrefix(first, "."), ".") {
			continue
		}
		if !exists(match[1]) && !exists(filepath.Join(dir, match[1])) {
			dead = append(dead, match[1])
		}
	}
	return dead
}

func TestDocumentsPointAtWhatExists(t *testing.T) {
	documents := []string{"README.md"}
	err := filepath.WalkDir("docs", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && filepath.Ext(path) == ".md" {
			documents = append(documents, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	require.NoError(t, err)
	for _, document := range documents {
		t.Run(document, func(t *testing.T) {
			text, err := os.ReadFile(document)
			require.NoError(t, err)
			require.Empty(t, deadPointers(os.DirFS("."), filepath.Dir(document), string(text)))
		})
	}
}

func TestDeadPointersAreFound(t *testing.T) {
	text := "See [the wiring](../main.go), [gone](gone.md#here), [outside](https://example.org/x.md), [below](#below),\n" +
		"`config/load.go`, `config/gone.go`, `config/gone/`, `example.org/x/y.go`, `data/`.\n" +
		"```\n[in a block](no.md) `no/such.go`\n```\n"
	require.Equal(t, []string{"gone.md#here", "config/gone.go", "config/gone/"}, deadPointers(os.DirFS("."), "config", text))
}
