# What `generate.py` builds: small paths of every kind that a binary cache can hold.
let
  shell =
    args:
    derivation (
      {
        system = "x86_64-linux";
        builder = "/bin/sh";
        PATH = "/usr/bin:/bin";
      }
      // args
      // {
        args = [
          "-euc"
          args.script
        ];
      }
    );
  floating = {
    __contentAddressed = true;
    outputHashAlgo = "sha256";
    outputHashMode = "recursive";
  };
  buildId = "/lib/debug/.build-id/ab";
  library = shell {
    name = "library";
    script = "mkdir $out; echo library > $out/lib.txt; ln -s lib.txt $out/link";
  };
in
rec {
  program = shell {
    name = "program-1.0";
    inherit library;
    script = ''
      mkdir -p $out/bin $out${buildId}
      printf '#!/bin/sh\necho %s %s\n' $library $out > $out/bin/program
      chmod +x $out/bin/program
      echo symbols > $out${buildId}/cdef0123456789abcdef0123456789abcdef01.debug
    '';
  };
  floatingLibrary = shell (
    floating
    // {
      name = "floating-library";
      script = "echo floating > $out";
    }
  );
  floatingProgram = shell (
    floating
    // {
      name = "floating-program";
      inherit floatingLibrary;
      outputs = [
        "out"
        "dev"
      ];
      script = "echo $floatingLibrary $out > $out; echo headers > $dev";
    }
  );
  fixedFile = shell {
    name = "fixed-file";
    outputHashAlgo = "sha256";
    outputHashMode = "flat";
    outputHash = builtins.hashString "sha256" "fixed\n";
    script = "echo fixed > $out";
  };
  text = builtins.toFile "foo" "bar";
  otherText = builtins.toFile "other" "";
  textWithReferences = builtins.toFile "two-references" "${text} ${otherText}\n";
}
