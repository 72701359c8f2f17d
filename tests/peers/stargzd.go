// stargzd serves stargz-snapshotter's library as containerd's proxy plugin, as its own daemon does,
// with its default configuration: lazy layers, their content verified against the TOC.
//
//	stargzd SOCKET ROOT
package main

import (
	"context"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"google.golang.org/grpc"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatalf("usage: %s SOCKET ROOT", os.Args[0])
	}
	socket, root := os.Args[1], os.Args[2]
	snapshotter, err := service.NewStargzSnapshotterService(context.Background(), root, &service.Config{})
	if err != nil {
		log.Fatalf("snapshotter at %s: %v", root, err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatalf("socket %s: %v", socket, err)
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-stop
		server.Stop()
	}()
	if err := server.Serve(listener); err != nil {
		log.Fatalf("serve %s: %v", socket, err)
	}
	if err := snapshotter.Close(); err != nil {
		log.Fatalf("close %s: %v", root, err)
	}
}
