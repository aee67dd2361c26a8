package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/modules/intake"
)

// problemTypes lists the types of problems that a file makes: what is written
// into the field Type of a Problem. One that is not a literal would escape, so
// it fails the test.
func problemTypes(t *testing.T, path string) []string {
	t.Helper()
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, path, nil, 0)
	require.NoError(t, err)
	var types []string
	add := func(value ast.Expr) {
		literal, ok := value.(*ast.BasicLit)
		require.True(t, ok, "%s: the type of a problem must be written as a literal, or nobody can look whether it has a page", files.Position(value.Pos()))
		name, err := strconv.Unquote(literal.Value)
		require.NoError(t, err)
		types = append(types, name)
	}
	problems := map[string]bool{} // variables that are one
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CompositeLit:
			if !isProblem(n.Type) {
				return true
			}
			for _, element := range n.Elts {
				if pair, ok := element.(*ast.KeyValueExpr); ok && pair.Key.(*ast.Ident).Name == "Type" {
					add(pair.Value)
				}
			}
		case *ast.AssignStmt:
			for i, left := range n.Lhs {
				if name, ok := left.(*ast.Ident); ok && i < len(n.Rhs) {
					if made, ok := n.Rhs[i].(*ast.CompositeLit); ok && isProblem(made.Type) {
						problems[name.Name] = true
					}
				}
				field, ok := left.(*ast.SelectorExpr)
				if !ok || field.Sel.Name != "Type" {
					continue
				}
				if of, ok := field.X.(*ast.Ident); ok && problems[of.Name] {
					add(n.Rhs[i])
				}
			}
		}
		return true
	})
	return types
}

func isProblem(typ ast.Expr) bool {
	switch typ := typ.(type) {
	case *ast.Ident:
		return typ.Name == "Problem"
	case *ast.SelectorExpr:
		return typ.Sel.Name == "Problem"
	default:
		return false
	}
}

func TestEveryProblemHasAPageAndEveryPageAProblem(t *testing.T) {
	made := map[string]string{}
	for _, p := range listPackages(t) {
		if strings.HasPrefix(p.path(), "e2e") {
			continue // the stand-in's problems are the backend's
		}
		for _, name := range p.GoFiles {
			for _, typ := range problemTypes(t, filepath.Join(p.Dir, name)) {
				made[typ] = name
			}
		}
	}
	require.NotEmpty(t, made)
	var explained []string
	for _, known := range intake.ProblemTypes() {
		explained = append(explained, known.Name)
	}
	for typ, file := range made {
		require.Contains(t, explained, typ, "%s makes a problem that has no page: describe it in ProblemTypes", file)
	}
	for _, typ := range explained {
		require.Contains(t, made, typ, "nothing makes this problem any more")
	}
}
